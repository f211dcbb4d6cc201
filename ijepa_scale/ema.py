"""The target encoder's update. Floor 2: tensors only; which tensors is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_target(target: list[Tensor], source: list[Tensor], momentum: float) -> None:
    """Moves `target` to momentum * target + (1 - momentum) * source, in place and without communication.

    Both are fp32 tensors of equal shapes, in the same order: with bf16 the update would vanish, since
    1 - momentum is below its resolution (nothing moved in 1000 updates at 0.996).

    Source: the I-JEPA paper (arXiv 2301.08243), section 3, "Targets".
    """
    assert all(t.dtype == torch.float32 for t in target), "the target's shards must be fp32"
    assert [t.shape for t in target] == [s.shape for s in source], "target and source are cut differently"
    if target:
        torch._foreach_lerp_(target, source, 1.0 - momentum)

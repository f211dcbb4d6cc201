"""The target encoder's update. Floor 2: tensors only; which tensors is the engine's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ijepa_kernels.target_update import target_update


@torch.no_grad()
def update_target(
    target: list[Tensor],
    source: list[Tensor],
    momentum: float,
    *,
    copies: Sequence[Tensor | None] = (),
    stopped: Tensor | None = None,
    implementation: str = "auto",
) -> None:
    """Moves `target` to momentum * target + (1 - momentum) * source, in place and without communication.

    Both are fp32 tensors of equal shapes, in the same order: with bf16 the update would vanish, since
    1 - momentum is below its resolution (nothing moved in 1000 updates at 0.996). `copies` get the bf16 rounding of
    the tensors that have one. Where `stopped`, () fp32 on the device, isn't 0, nothing moves. Doesn't synchronise.

    Source: the I-JEPA paper (arXiv 2301.08243), section 3, "Targets".
    """
    assert all(t.dtype == torch.float32 for t in target), "the target's shards must be fp32"
    assert [t.shape for t in target] == [s.shape for s in source], "target and source are cut differently"
    kept = list(copies) or [None] * len(target)
    for copied in (False, True):
        chosen = [index for index, copy in enumerate(kept) if (copy is not None) == copied]
        target_update(
            [target[index] for index in chosen],
            [source[index] for index in chosen],
            momentum,
            copies=[copy for copy in kept if copy is not None] if copied else None,
            found_nonfinite=stopped,
            implementation=implementation,
        )

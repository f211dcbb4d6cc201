"""The target's update with PyTorch's own multi-tensor kernels: one launch for many tensors, no synchronisation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def target_update(
    target: list[Tensor],
    source: list[Tensor],
    momentum: float,
    *,
    copies: list[Tensor] | None = None,
    found_nonfinite: Tensor | None = None,
) -> None:
    """Moves `target` towards `source` in place; see `ijepa_kernels.target_update.target_update`.

    Skips empty shards, which not every multi-tensor kernel accepts.
    """
    held = [index for index, x in enumerate(target) if x.numel()]
    if not held:
        return
    target, source = [target[index] for index in held], [source[index] for index in held]
    if found_nonfinite is None:
        torch._foreach_lerp_(target, source, 1.0 - momentum)
    else:
        # SGD, maximising, with weight decay 1: target - lr * (target - source). The kernel reads found_inf on the
        # device. It computes in float64 on CUDA, so lr is rounded to fp32 first, as lerp rounds its weight.
        stop = (found_nonfinite != 0).float().reshape(())  # only 1.0 stops the kernel
        rate = float(np.float32(1.0 - momentum))
        torch._fused_sgd_(
            target, source, [], weight_decay=1.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
            maximize=True, is_first_step=False, found_inf=stop,
        )  # fmt: skip
    if copies is not None:
        torch._foreach_copy_([copies[index] for index in held], target)

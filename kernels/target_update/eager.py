"""The target's update by PyTorch's own multi-tensor kernels: a launch for many tensors, no synchronisation."""

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

    A shard may be empty, which not every multi-tensor kernel takes: such pairs are left out.
    """
    held = [index for index, x in enumerate(target) if x.numel()]
    if not held:
        return
    target, source = [target[index] for index in held], [source[index] for index in held]
    if found_nonfinite is None:
        torch._foreach_lerp_(target, source, 1.0 - momentum)
    else:
        # SGD, maximising, with weight decay 1: target - lr * (target - source), and found_inf is read on the device.
        # lr rounded to fp32 first, as lerp's weight is: on CUDA this kernel computes in float64.
        stop = (found_nonfinite != 0).float().reshape(())  # 1.0 is the only number that stops it
        rate = float(np.float32(1.0 - momentum))
        torch._fused_sgd_(
            target, source, [], weight_decay=1.0, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
            maximize=True, is_first_step=False, found_inf=stop,
        )  # fmt: skip
    if copies is not None:
        torch._foreach_copy_([copies[index] for index in held], target)

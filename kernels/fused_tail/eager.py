"""The tail of a step with PyTorch's own kernels: AdamW for each group, the target's update, then each kind of copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ijepa_kernels.fp8_linear.reference import quantise_rows
from ijepa_kernels.target_update.eager import target_update

if TYPE_CHECKING:
    from ijepa_kernels.fused_tail import Rates, Weight


def fused_tail(
    weights: Sequence[Weight],
    rates: Sequence[Rates],
    *,
    momentum: float | None = None,
    stopped: Tensor | None = None,
    gradient_scale: Tensor | None = None,
) -> None:
    """Moves weights, moments, step counters, targets and copies; see `ijepa_kernels.fused_tail.fused_tail`.

    Multiplies the gradients by `gradient_scale` in place.
    """
    stop = None if stopped is None else (stopped != 0).float().reshape(())  # only 1.0 stops PyTorch's kernels
    for group, rate in enumerate(rates):
        _adamw([weight for weight in weights if weight.group == group], rate, stop, gradient_scale)
    copied = [weight for weight in weights if weight.copy is not None]
    if copied:
        torch._foreach_copy_([weight.copy for weight in copied], [weight.value for weight in copied])
    for has_copy in (False, True):
        chosen = [w for w in weights if w.target is not None and (w.target_copy is not None) == has_copy]
        if chosen:
            assert momentum is not None
            lists = [[w.target for w in chosen], [w.value for w in chosen]]
            copies = [w.target_copy for w in chosen] if has_copy else None
            target_update(*lists, momentum, copies=copies, found_nonfinite=stopped)  # type: ignore[arg-type]
    for weight in weights:
        if weight.target is not None and weight.quantised is not None:
            for copy, value in zip(weight.quantised, quantise_rows(weight.target), strict=True):
                copy.copy_(value)


def _adamw(weights: Sequence[Weight], rate: Rates, stop: Tensor | None, gradient_scale: Tensor | None) -> None:
    if not weights:
        return
    gradients, steps = [weight.gradient for weight in weights], [weight.step for weight in weights]
    if gradient_scale is not None:
        torch._foreach_mul_(gradients, gradient_scale)
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        [weight.value for weight in weights], gradients, [weight.exp_avg for weight in weights],
        [weight.exp_avg_sq for weight in weights], [], steps, lr=rate.lr, beta1=rate.betas[0], beta2=rate.betas[1],
        weight_decay=rate.weight_decay, eps=rate.eps, amsgrad=False, maximize=False, found_inf=stop,
    )  # fmt: skip
    if stop is not None:
        torch._foreach_sub_(steps, [stop] * len(steps))

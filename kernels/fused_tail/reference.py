"""The specification of `fused_tail`: weight by weight, in elementary operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ijepa_kernels.fp8_linear.reference import quantise_rows
from ijepa_kernels.target_update.reference import target_update

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
    """Moves weights, moments, step counters, targets and copies; see `ijepa_kernels.fused_tail.fused_tail`."""
    for weight in weights:
        rate, old = rates[weight.group], weight.value
        beta1, beta2 = rate.betas
        gradient = weight.gradient if gradient_scale is None else weight.gradient * gradient_scale
        step = weight.step + 1.0
        exp_avg = beta1 * weight.exp_avg + (1.0 - beta1) * gradient
        exp_avg_sq = beta2 * weight.exp_avg_sq + (1.0 - beta2) * gradient * gradient
        # in fp64: in fp32, 1 - 0.999 alone is off by 6e-5 of itself
        step_size = (rate.lr / (1.0 - beta1 ** step.double())).float()
        root = (1.0 - beta2 ** step.double()).sqrt().float()
        moved = old * (1.0 - rate.lr * rate.weight_decay) - step_size * exp_avg / (exp_avg_sq.sqrt() / root + rate.eps)
        new = [(old, moved), (weight.exp_avg, exp_avg), (weight.exp_avg_sq, exp_avg_sq), (weight.step, step)]
        for state, value in new:
            state.copy_(value if stopped is None else torch.where(stopped.reshape(()) == 0, value, state))
        if weight.copy is not None:
            weight.copy.copy_(old)
        if weight.target is not None:
            assert momentum is not None
            copies = None if weight.target_copy is None else [weight.target_copy]
            target_update([weight.target], [old], momentum, copies=copies, found_nonfinite=stopped)
            if weight.quantised is not None:
                for copy, value in zip(weight.quantised, quantise_rows(weight.target), strict=True):
                    copy.copy_(value)

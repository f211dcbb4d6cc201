"""The tail of a training step: AdamW, the target's update, bf16 copies and fp8 quantisation, each weight read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ijepa_kernels.choice import check_implementation, triton_missing
from ijepa_kernels.fp8_linear import FP8
from ijepa_kernels.fused_tail.eager import fused_tail as fused_tail_eager
from ijepa_kernels.fused_tail.reference import fused_tail as fused_tail_reference

if TYPE_CHECKING:
    from ijepa_kernels.fused_tail.triton import Table

IMPLEMENTATIONS = ("auto", "eager", "reference", "triton")


class Weight(NamedTuple):
    """A weight of any shape and all that moves with it, contiguous and on one device."""

    value: Tensor  # fp32
    gradient: Tensor  # fp32, like the moments
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # () fp32: steps that were taken
    group: int = 0  # index of its rates
    copy: Tensor | None = None  # bf16, of the value
    target: Tensor | None = None  # fp32, follows the value
    target_copy: Tensor | None = None  # bf16, of the target
    quantised: tuple[Tensor, Tensor] | None = None  # of a target (N, K): (N, K) float8_e4m3fn and scales (N, 1) fp32


class Rates(NamedTuple):
    """The settings of AdamW for a group of weights."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@torch.no_grad()
def fused_tail(
    weights: Sequence[Weight],
    rates: Sequence[Rates],
    *,
    momentum: float | None = None,
    stopped: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    table: Table | None = None,
    implementation: str = "auto",
) -> None:
    """Takes one AdamW step, moves the targets towards the new values, and renews all copies, in place.

    The step is that of `torch.optim.AdamW`: decoupled weight decay, bias correction by each weight's own counter. The
    target becomes momentum * target + (1 - momentum) * value, as in `ijepa_kernels.target_update`. Each row of an fp8
    copy has the scale max|row| / 448, as in `ijepa_kernels.fp8_linear.quantise_rows`. Nothing synchronises or
    communicates.

    "auto" is eager; Triton runs on request only, until a benchmark shows that it is faster. Eager is
    `torch._fused_adamw_` for each group, then `target_update`, then each kind of copy; it multiplies the gradients by
    `gradient_scale` in place. The implementations differ by roundings in fp32.

    Args:
        weights: what moves.
        rates: of each group.
        momentum: of the targets, 0 to 1; None if no weight has a target.
        stopped: one fp32 number on the device; unless it is 0, nothing moves, not even moments and counters.
        gradient_scale: one fp32 number on the device that multiplies all gradients (clipping).
        table: for triton: the result of `prepare` for these weights; by default each call makes and sends a new one.
        implementation: auto, eager, reference or triton.

    Raises:
        ValueError: the tensors, the momentum or the table don't fit, or Triton isn't available.

    Source: arXiv 1711.05101, algorithm 2; arXiv 2301.08243, section 3, "Targets".
    """
    if table is None:
        _check(weights, len(rates))
    _check_gradients(weights)
    _check_momentum(weights, momentum)
    check_implementation(implementation, IMPLEMENTATIONS)
    for name, number in (("stopped", stopped), ("gradient_scale", gradient_scale)):
        if number is not None and (number.numel() != 1 or number.dtype != torch.float32):
            raise ValueError(f"{name} is {tuple(number.shape)} {number.dtype}; give one float32 number")
    options = {"momentum": momentum, "stopped": stopped, "gradient_scale": gradient_scale}
    if implementation != "triton":
        run = fused_tail_reference if implementation == "reference" else fused_tail_eager
        run(weights, rates, **options)  # type: ignore[arg-type]
    elif weights:
        kernels = _triton()
        kernels.fused_tail(kernels.Table(weights) if table is None else table, weights, rates, **options)


@torch.no_grad()
def prepare(weights: Sequence[Weight]) -> Table:
    """Returns the table of addresses of these weights, on their device, for `fused_tail` with Triton.

    The table is valid as long as all tensors but the gradients keep their memory; each step compares the addresses on
    the host.

    Raises:
        ValueError: the tensors don't fit together, there are none, they aren't on CUDA, or Triton isn't available.
    """
    _check(weights, None)
    if not weights:
        raise ValueError("there are no weights to prepare; give at least one")
    return _triton().Table(weights)


def _triton():  # noqa: ANN202
    """Returns the module of the Triton kernel."""
    try:
        from ijepa_kernels.fused_tail import triton as kernels
    except ImportError as error:
        raise triton_missing("fused_tail", error, "eager") from None
    return kernels


def cost(values: int, *, copy: bool = False, target: str | None = None) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of a step of this many values; bandwidth is the limit.

    Value, gradient and both moments are read, and all but the gradient written, in fp32; a copy adds 2 bytes. A
    `target` is read and written in fp32, and its copy, "bf16" or "fp8", adds 2 bytes or 1; "fp32" has no copy.
    """
    copies = {"fp32": 0.0, "bf16": 2.0, "fp8": 1.0}
    moved = 0.0 if target is None else 4.0 + copies[target]
    return {
        "read_bytes": (16.0 if target is None else 20.0) * values,
        "written_bytes": (12.0 + (2.0 if copy else 0.0) + moved) * values,
        "flops": (14.0 if target is None else 17.0) * values,
    }


def _check(weights: Sequence[Weight], num_groups: int | None) -> None:
    devices = set()
    for index, weight in enumerate(weights):
        if num_groups is not None and not 0 <= weight.group < num_groups:
            raise ValueError(f"weight {index} is in group {weight.group} of {num_groups}; give rates for each group")
        shape = weight.value.shape
        expected = {
            "value": (weight.value, shape, torch.float32),
            "exp_avg": (weight.exp_avg, shape, torch.float32),
            "exp_avg_sq": (weight.exp_avg_sq, shape, torch.float32),
            "step": (weight.step, torch.Size(()), torch.float32),
            "copy": (weight.copy, shape, torch.bfloat16),
            "target": (weight.target, shape, torch.float32),
            "target_copy": (weight.target_copy, shape, torch.bfloat16),
        }
        if weight.quantised is not None:
            if weight.target is None or len(shape) != 2:
                raise ValueError(f"weight {index} {tuple(shape)} has an fp8 copy; only targets (N, K) have one")
            values, scales = weight.quantised
            expected["quantised"] = values, shape, FP8
            expected["scales"] = scales, torch.Size((shape[0], 1)), torch.float32
        if weight.target_copy is not None and weight.target is None:
            raise ValueError(f"weight {index} has a target_copy but no target; give both or neither")
        for name, (tensor, size, dtype) in expected.items():
            if tensor is not None:
                _check_tensor(f"{name} of weight {index}", tensor, size, dtype)
                devices.add(tensor.device)
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")


def _check_gradients(weights: Sequence[Weight]) -> None:
    for index, weight in enumerate(weights):
        name, device = f"gradient of weight {index}", weight.value.device
        _check_tensor(name, weight.gradient, weight.value.shape, torch.float32)
        if weight.gradient.device != device:
            raise ValueError(f"{name} is on {weight.gradient.device}; move it to {device}")


def _check_tensor(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        contiguous = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}{contiguous}; give {tuple(shape)} {dtype}, contiguous"
        )


def _check_momentum(weights: Sequence[Weight], momentum: float | None) -> None:
    followed = any(weight.target is not None for weight in weights)
    if momentum is None and followed:
        raise ValueError("momentum is None but weights have targets; give a number from 0 to 1")
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum is {momentum}; give a number from 0 to 1")


__all__ = [
    "IMPLEMENTATIONS",
    "Rates",
    "Weight",
    "cost",
    "fused_tail",
    "fused_tail_eager",
    "fused_tail_reference",
    "prepare",
]

"""The target encoder's update: all fp32 tensors at once, with optional bf16 copies and a flag that stops it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ijepa_kernels.choice import check_implementation, triton_missing
from ijepa_kernels.target_update.eager import target_update as target_update_eager
from ijepa_kernels.target_update.reference import target_update as target_update_reference

if TYPE_CHECKING:
    from ijepa_kernels.target_update.triton import Table

IMPLEMENTATIONS = ("auto", "eager", "reference", "triton")


@torch.no_grad()
def target_update(
    target: list[Tensor],
    source: list[Tensor],
    momentum: float,
    *,
    copies: list[Tensor] | None = None,
    found_nonfinite: Tensor | None = None,
    table: Table | None = None,
    implementation: str = "auto",
) -> None:
    """Moves `target` to momentum * target + (1 - momentum) * source in place, and rounds the result into `copies`.

    Each value is target + w * (source - target) with w = 1 - momentum in fp32, as `torch._foreach_lerp_` computes it.
    The results of two implementations differ by at most 1 ulp of the larger of the two values, because only some use
    a fused multiply-add. Neither synchronises nor communicates. `copies` always hold the rounded `target` afterwards,
    even if the flag stopped the update.

    "auto" is eager; Triton runs on request only, until a benchmark shows that it is faster. Eager is
    `torch._foreach_lerp_`, or with a flag `torch._fused_sgd_`, which reads the flag on the device, and then
    `torch._foreach_copy_`.

    Args:
        target: fp32 tensors of any shapes, contiguous, on one device.
        source: fp32 tensors with the shapes of `target`, in the same order; unchanged.
        momentum: from 0 to 1.
        copies: bf16 tensors of the same shapes.
        found_nonfinite: one fp32 number on the device; unless it is 0 the target stays as it is.
        table: for triton: the result of `prepare` for these lists; by default each call makes and sends a new one.
        implementation: auto, eager, reference or triton.

    Raises:
        ValueError: lists, dtypes, devices, momentum or table don't fit, or Triton isn't available.

    Source: arXiv 2301.08243, section 3, "Targets".
    """
    _check(target, source, copies, found_nonfinite)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum is {momentum}; give a number from 0 to 1")
    check_implementation(implementation, IMPLEMENTATIONS)
    if implementation != "triton":
        run = target_update_reference if implementation == "reference" else target_update_eager
        run(target, source, momentum, copies=copies, found_nonfinite=found_nonfinite)
    elif target:
        kernels = _triton()
        table = kernels.Table(target, source, copies) if table is None else table
        kernels.target_update(table, (target, source, copies), momentum, found_nonfinite)


@torch.no_grad()
def prepare(target: list[Tensor], source: list[Tensor], copies: list[Tensor] | None = None) -> Table:
    """Returns the table of addresses of these tensors, on their device, for `target_update` with Triton.

    The table is valid as long as the tensors keep their memory; each update compares the addresses on the host.

    Raises:
        ValueError: the lists don't fit together, are empty or not on CUDA, or Triton isn't available.
    """
    _check(target, source, copies, None)
    if not target:
        raise ValueError("there are no tensors to prepare; give at least one")
    return _triton().Table(target, source, copies)


def _triton():  # noqa: ANN202
    """Returns the module of the Triton kernel."""
    try:
        from ijepa_kernels.target_update import triton as kernels
    except ImportError as error:
        raise triton_missing("target_update", error, "eager") from None
    return kernels


def cost(values: int, *, copies: bool) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of an update of this many values; bandwidth is the limit.

    Each value takes two fp32 reads, one fp32 write, a bf16 write if there are copies, and 3 operations.
    """
    return {
        "read_bytes": 8.0 * values,
        "written_bytes": (6.0 if copies else 4.0) * values,
        "flops": 3.0 * values,
    }


def _check(
    target: list[Tensor], source: list[Tensor], copies: list[Tensor] | None, found_nonfinite: Tensor | None
) -> None:
    lists = {"target": target, "source": source, **({} if copies is None else {"copies": copies})}
    shapes = [x.shape for x in target]
    for name, tensors in lists.items():
        if [x.shape for x in tensors] != shapes:
            raise ValueError(
                f"target and {name} differ in number or shapes; give lists of the same shapes in the same order"
            )
        expected = torch.bfloat16 if name == "copies" else torch.float32
        dtypes = {x.dtype for x in tensors} - {expected}
        if dtypes:
            raise ValueError(f"{name} has tensors of {', '.join(sorted(map(str, dtypes)))}; give {expected} only")
        if not all(x.is_contiguous() for x in tensors):
            raise ValueError(f"{name} has tensors that aren't contiguous; give contiguous tensors")
    devices = {x.device for tensors in lists.values() for x in tensors}
    if found_nonfinite is not None:
        devices |= {found_nonfinite.device} if target else set()
        if found_nonfinite.numel() != 1 or found_nonfinite.dtype != torch.float32:
            raise ValueError(
                f"found_nonfinite is {tuple(found_nonfinite.shape)} {found_nonfinite.dtype}; give one float32 number"
            )
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")


__all__ = ["IMPLEMENTATIONS", "cost", "prepare", "target_update", "target_update_eager", "target_update_reference"]

"""The affine layer norm over the last dimension, computed in fp32, with a result in the dtype that follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ijepa_kernels.choice import check_implementation, triton_missing
from ijepa_kernels.layer_norm.reference import layer_norm as layer_norm_reference

IMPLEMENTATIONS = ("auto", "reference", "triton")
_FLOATING = (torch.float32, torch.bfloat16)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
) -> Tensor:
    """Returns (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in the shape of `x`.

    Computes in fp32, whatever the dtypes are. A bf16 result feeds a bf16 linear layer without a further cast. Doesn't
    synchronise; sums in a fixed order.

    "auto" is the reference: PyTorch's own norm and a cast, which torch.compile fuses. Triton runs on request only,
    until a benchmark shows that it is faster.

    Args:
        x: (..., D) fp32 or bf16; its gradient has the same dtype.
        weight: (D,) fp32.
        bias: (D,) fp32.
        eps: added to the variance.
        dtype: dtype of the result, float32 or bfloat16.
        implementation: auto, reference or triton.

    Raises:
        ValueError: shapes, dtypes, devices or names don't fit, or Triton isn't available.

    Source: arXiv 1607.06450, "Layer normalization", section 3.1.
    """
    if x.dim() < 1 or not x.shape[-1] or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} don't fit; "
            "give (..., D), (D,) and (D,)"
        )
    if x.dtype not in _FLOATING or dtype not in _FLOATING or {weight.dtype, bias.dtype} != {torch.float32}:
        raise ValueError(
            f"x is {x.dtype}, weight {weight.dtype}, bias {bias.dtype}, the result {dtype}; give float32 or bfloat16 "
            "for x and the result, float32 for weight and bias"
        )
    if not x.device == weight.device == bias.device:
        raise ValueError(f"the tensors are on {x.device}, {weight.device}, {bias.device}; move them to one device")
    check_implementation(implementation, IMPLEMENTATIONS)
    run = _triton() if implementation == "triton" else layer_norm_reference
    return run(x, weight, bias, eps=eps, dtype=dtype)


def _triton() -> Callable[..., Tensor]:
    """Returns the Triton kernel's function."""
    try:
        from ijepa_kernels.layer_norm.triton import layer_norm as kernel
    except ImportError as error:
        raise triton_missing("layer_norm", error, "reference") from None
    return kernel


def cost(rows: int, width: int, *, input_bytes: int, output_bytes: int, backward: bool = False) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of one pass over (rows, width) values; bandwidth is the limit.

    Forward reads x and writes the result (8 operations per value). Backward reads the gradient of the result and x,
    and writes the gradient of x (14 operations per value). Weights and statistics are not counted: they add 1/rows
    and 1/width.
    """
    values = float(rows * width)
    if backward:
        return {
            "read_bytes": values * (input_bytes + output_bytes),
            "written_bytes": values * input_bytes,
            "flops": 14 * values,
        }
    return {"read_bytes": values * input_bytes, "written_bytes": values * output_bytes, "flops": 8 * values}


__all__ = ["IMPLEMENTATIONS", "cost", "layer_norm", "layer_norm_reference"]

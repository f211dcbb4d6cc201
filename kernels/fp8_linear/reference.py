"""The specification of `fp8_linear`: quantise rows to fp8, then multiply the dequantised values."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 448.0  # largest value of float8_e4m3fn
_LEAST = 1e-12  # stands in for the maximum of a row of zeros, so that nothing is divided by 0


@torch.no_grad()
def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values (..., K) float8_e4m3fn and scales (..., 1) fp32, so that values * scales approximates x (..., K).

    The largest magnitude of a row becomes 448, the largest value of the format. The error of a value is at most 1/16
    of it, or 2^-10 of the scale near 0 (3 bits of mantissa, smallest step 2^-9). A row with inf or NaN becomes NaN.

    Source: arXiv 2209.05433, "FP8 formats for deep learning", table 1.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=_LEAST) / _LARGEST
    return (wide / scale).to(torch.float8_e4m3fn), scale


def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the layer's output, (..., N) bf16; see `ijepa_kernels.fp8_linear.fp8_linear`.

    Computes in fp32, whatever autocast says.
    """
    values, scale = quantise_rows(x)
    with torch.autocast(x.device.type, enabled=False):
        out = (values.float() * scale) @ (weight.float() * weight_scale).T
    return (out if bias is None else out + bias.float()).to(torch.bfloat16)

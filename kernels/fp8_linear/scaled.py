"""The fp8 linear layer by `torch._scaled_mm`, wrapped once: its signature and what it takes move between releases.

Written for torch 2.11. CUDA: row-wise scales with a bf16 result. CPU: one scale for each tensor, fp32 result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_kernels.fp8_linear.reference import quantise_rows


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, fast_accumulation: bool = False
) -> Tensor:
    """Returns the layer's (..., N) bf16; see `ijepa_kernels.fp8_linear.fp8_linear`. Arguments have been checked."""
    values, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    shape = (*x.shape[:-1], weight.shape[0])
    if not values.numel():
        return x.new_empty(shape, dtype=torch.bfloat16)
    columns = weight.contiguous().t()  # the product wants its right side column by column
    if x.device.type == "cuda":
        return torch._scaled_mm(
            values, columns, scale_a=scale, scale_b=weight_scale.contiguous().t(),
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation,
        ).view(shape)  # fmt: skip
    one = torch.ones((), dtype=torch.float32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # the CPU's product is made of one that autocast rounds to bf16
        out = torch._scaled_mm(values, columns, scale_a=one, scale_b=one, out_dtype=torch.float32)
    out = out * scale * weight_scale.t()
    return (out if bias is None else out + bias.float()).to(torch.bfloat16).view(shape)

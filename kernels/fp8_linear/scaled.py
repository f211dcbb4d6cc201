"""The fp8 linear layer through `torch._scaled_mm`, whose signature and accepted inputs change between releases.

Written for torch 2.11. On CUDA it takes row-wise scales and returns bf16; on the CPU it takes one scale for each
tensor and returns fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_kernels.fp8_linear.reference import quantise_rows


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, fast_accumulation: bool = False
) -> Tensor:
    """Returns the layer's output, (..., N) bf16, for checked arguments; see `ijepa_kernels.fp8_linear.fp8_linear`."""
    values, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    shape = (*x.shape[:-1], weight.shape[0])
    if not values.numel():
        return x.new_empty(shape, dtype=torch.bfloat16)
    columns = weight.contiguous().t()  # the product needs a column-major right side
    if x.device.type == "cuda":
        return torch._scaled_mm(
            values, columns, scale_a=scale, scale_b=weight_scale.contiguous().t(),
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation,
        ).view(shape)  # fmt: skip
    one = torch.ones((), dtype=torch.float32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the product inside the CPU's to bf16
        out = torch._scaled_mm(values, columns, scale_a=one, scale_b=one, out_dtype=torch.float32)
    out = out * scale * weight_scale.t()
    return (out if bias is None else out + bias.float()).to(torch.bfloat16).view(shape)

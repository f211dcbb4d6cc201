"""A linear layer: PyTorch's own, but for fp32 on the CPU oneDNN's matrix products instead of MKL's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels.linear.onednn import is_available, onednn_linear

IMPLEMENTATIONS = ("auto", "torch", "onednn")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str = "auto") -> Tensor:
    """Returns input @ weight^T + bias, (..., out); `input` is (..., in), `weight` (out, in), `bias` (out,).

    `auto` is oneDNN for fp32 on the CPU, and PyTorch's `F.linear` for everything else, under autocast and in compiled
    code (torch.compile supports the oneDNN operation in frozen models only). PyTorch sends fp32 products on CPUs to
    MKL, which leaves 7 to 10% of the peak of AMD processors unused (one EPYC core: 100 GFLOP/s against 110).

    Raises:
        ValueError: the implementation is unknown, oneDNN can't take these tensors, or the widths don't fit. Compiled
            code doesn't check the widths.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    fits = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    fits = fits and (bias is None or bias.dtype == torch.float32)
    fits = fits and not torch.is_autocast_enabled("cpu") and is_available()
    if implementation == "onednn" and not fits:
        raise ValueError(
            f"onednn takes fp32 on the CPU outside autocast, not {input.dtype} and {weight.dtype} on "
            f"{input.device.type} (oneDNN {'is' if is_available() else 'is not'} built in); choose auto"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check_widths(input, weight, bias)
    if implementation == "torch" or not fits or compiling:
        return F.linear(input, weight, bias)
    return onednn_linear(input, weight, bias)


def _check_widths(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    bias_shape = weight.shape[:1] if bias is None else bias.shape
    if weight.dim() != 2 or input.shape[-1:] != weight.shape[1:] or bias_shape != weight.shape[:1]:
        raise ValueError(
            f"input {tuple(input.shape)}, weight {tuple(weight.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)} don't fit; expected (..., in), (out, in) and (out,): "
            "pass the weight and the bias that belong to this width"
        )


def cost(rows: int, inputs: int, outputs: int, *, bytes_per_value: int) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of one forward pass."""
    moved = rows * (inputs + outputs) + inputs * outputs + outputs
    return {"bytes": float(bytes_per_value * moved), "flops": 2.0 * rows * inputs * outputs}


__all__ = ["IMPLEMENTATIONS", "cost", "linear"]

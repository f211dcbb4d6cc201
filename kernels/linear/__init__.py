"""A linear layer: PyTorch's own, and on the CPU in fp32 oneDNN's products in place of MKL's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels.linear.onednn import is_available, onednn_linear

IMPLEMENTATIONS = ("auto", "torch", "onednn")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str = "auto") -> Tensor:
    """Returns input @ weight^T + bias, (..., out); `input` is (..., in), `weight` (out, in), `bias` (out,).

    `auto` is oneDNN for fp32 on the CPU outside autocast and compiled code (torch.compile knows the operation in
    frozen models only), and PyTorch's `F.linear` everywhere else. PyTorch hands fp32 products on CPUs to MKL,
    which on AMD processors leaves 7 to 10% of their peak unused (one EPYC core: 100 GFLOP/s against 110).

    Raises:
        ValueError: an unknown implementation, or oneDNN for tensors that it doesn't take here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    fits = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    fits = fits and not torch.is_autocast_enabled("cpu") and is_available()
    if implementation == "onednn" and not fits:
        raise ValueError(
            f"onednn takes fp32 on the CPU outside autocast, not {input.dtype} and {weight.dtype} on "
            f"{input.device.type} (oneDNN {'is' if is_available() else 'is not'} built in); choose auto"
        )
    if implementation == "torch" or not fits or torch.compiler.is_compiling():
        return F.linear(input, weight, bias)
    return onednn_linear(input, weight, bias)


def cost(rows: int, inputs: int, outputs: int, *, bytes_per_value: int) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of one forward."""
    moved = rows * (inputs + outputs) + inputs * outputs + outputs
    return {"bytes": float(bytes_per_value * moved), "flops": 2.0 * rows * inputs * outputs}


__all__ = ["IMPLEMENTATIONS", "cost", "linear"]

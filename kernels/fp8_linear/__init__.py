"""A linear layer in fp8 for a forward without gradients: rows of input and weight each have their own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_kernels.choice import check_implementation
from ijepa_kernels.fp8_linear.reference import fp8_linear as fp8_linear_reference
from ijepa_kernels.fp8_linear.reference import quantise_rows
from ijepa_kernels.fp8_linear.scaled import fp8_linear as fp8_linear_scaled

IMPLEMENTATIONS = ("auto", "reference", "scaled_mm")
FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # of both widths: what fp8 matrix products take
CAPABILITY = (8, 9)  # the first with fp8 matrix units: Ada; Hopper is (9, 0)


class Fp8UnavailableError(ValueError):
    """This device or these widths have no fp8 matrix product."""


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    fast_accumulation: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Returns x @ (weight * weight_scale)^T + bias, (..., N) bf16; x is quantised row by row on the way.

    Forward only. "auto" is `torch._scaled_mm`: with row-wise scales on CUDA; on the CPU, which takes one scale for
    a whole tensor, with scales of 1 and the rows scaled afterwards. It never falls back to another precision.
    Quantising reads x twice in eager PyTorch; torch.compile fuses it. Nothing synchronises.

    Args:
        x: (..., K) bf16 or fp32.
        weight: (N, K) float8_e4m3fn and
        weight_scale: (N, 1) fp32, both by `quantise_rows`, once per update of the weights.
        bias: (N,); added in fp32, on CUDA rounded to bf16 first.
        fast_accumulation: on CUDA, sums with fewer bits on the tensor cores: faster and less exact.
        implementation: auto, scaled_mm or reference.

    Raises:
        Fp8UnavailableError: the GPU has no fp8 product, or K or N is not a multiple of 16.
        ValueError: shapes or dtypes that don't fit, or gradients are wanted.

    Source: the format and its largest value are those of arXiv 2209.05433, "FP8 formats for deep learning".
    """
    _check(x, weight, weight_scale, bias)
    check_implementation(implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return fp8_linear_reference(x, weight, weight_scale, bias)
    check_capability(x.device)
    return fp8_linear_scaled(x, weight, weight_scale, bias, fast_accumulation=fast_accumulation)


def check_capability(device: torch.device) -> None:
    """Checks that the device multiplies fp8 matrices; the CPU does, slowly.

    Raises:
        Fp8UnavailableError: it doesn't.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            raise Fp8UnavailableError(
                f"{device} has compute capability {found[0]}.{found[1]}, fp8 products need "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} or higher; set precision bf16"
            )


def cost(rows: int, inputs: int, outputs: int, *, input_bytes: int) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of (rows, inputs) -> (rows, outputs): x is read once.

    The quantised rows are written and read once more, unless a compiler puts that into what made x. The FLOPs are
    the product's: at the widths of ViT-H they decide.
    """
    quantised = rows * inputs + 4 * rows
    weights = outputs * inputs + 4 * outputs
    return {
        "read_bytes": float(rows * inputs * input_bytes + quantised + weights),
        "written_bytes": float(quantised + 2 * rows * outputs),
        "flops": 2.0 * rows * inputs * outputs,
    }


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.dtype != FP8 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} {weight.dtype} don't fit; give (..., K) and "
            f"(N, K) {FP8}, by quantise_rows"
        )
    outputs, inputs = weight.shape
    if inputs % MULTIPLE or outputs % MULTIPLE:
        raise Fp8UnavailableError(
            f"fp8 products take widths that are multiples of {MULTIPLE}, not {inputs} -> {outputs}; "
            "set precision bf16 for this layer"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}; give float32 or bfloat16")
    if weight_scale.shape != (outputs, 1) or weight_scale.dtype != torch.float32:
        raise ValueError(
            f"weight_scale is {tuple(weight_scale.shape)} {weight_scale.dtype}; give ({outputs}, 1) float32"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias is {tuple(bias.shape)}; give ({outputs},)")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("fp8_linear has no gradient and x requires one; call it under torch.no_grad()")


__all__ = [
    "CAPABILITY",
    "FP8",
    "IMPLEMENTATIONS",
    "Fp8UnavailableError",
    "check_capability",
    "cost",
    "fp8_linear",
    "fp8_linear_reference",
    "quantise_rows",
]

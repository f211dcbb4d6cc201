"""A linear layer in fp8, for the forward pass only; each row of input and weight has its own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_kernels.choice import check_implementation
from ijepa_kernels.fp8_linear.reference import fp8_linear as fp8_linear_reference
from ijepa_kernels.fp8_linear.reference import quantise_rows
from ijepa_kernels.fp8_linear.scaled import fp8_linear as fp8_linear_scaled

IMPLEMENTATIONS = ("auto", "reference", "scaled_mm")
FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # fp8 matrix products need both widths to be multiples of this
CAPABILITY = (8, 9)  # Ada, the first with fp8 matrix units; Hopper is (9, 0)


class Fp8UnavailableError(ValueError):
    """The device has no fp8 matrix product, or none for these widths."""


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    fast_accumulation: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Returns x @ (weight * weight_scale)^T + bias, (..., N) bf16; quantises x row by row first.

    Has no backward. "auto" is `torch._scaled_mm`, and never falls back to another precision. On CUDA it takes
    row-wise scales. On the CPU it takes one scale per tensor, so the scales are 1 and the rows are scaled afterwards.
    Quantising reads x twice in eager PyTorch; torch.compile fuses it. Doesn't synchronise.

    Args:
        x: (..., K) bf16 or fp32.
        weight: (N, K) float8_e4m3fn, from `quantise_rows` after each update of the weights.
        weight_scale: (N, 1) fp32, from the same call.
        bias: (N,); added in fp32, on CUDA rounded to bf16 first.
        fast_accumulation: on CUDA, sums with fewer bits on the tensor cores: faster and less exact.
        implementation: auto, scaled_mm or reference.

    Raises:
        Fp8UnavailableError: the GPU has no fp8 product, or K or N is not a multiple of 16.
        ValueError: shapes or dtypes don't fit, or x requires a gradient.

    Source: the format and its largest value are those of arXiv 2209.05433, "FP8 formats for deep learning".
    """
    _check(x, weight, weight_scale, bias)
    check_implementation(implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        return fp8_linear_reference(x, weight, weight_scale, bias)
    check_capability(x.device)
    return fp8_linear_scaled(x, weight, weight_scale, bias, fast_accumulation=fast_accumulation)


def check_capability(device: torch.device) -> None:
    """Checks that the device can multiply fp8 matrices; the CPU can, slowly.

    Raises:
        Fp8UnavailableError: the device can't.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            raise Fp8UnavailableError(
                f"{device} has compute capability {found[0]}.{found[1]}, but fp8 products need "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} or higher; set precision bf16"
            )


def cost(rows: int, inputs: int, outputs: int, *, input_bytes: int) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of (rows, inputs) -> (rows, outputs), reading x once.

    The quantised rows are written and read again, unless a compiler fuses that into the operation that made x. The
    FLOPs are those of the product; at the widths of ViT-H they are the limit.
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
            f"(N, K) {FP8}, from quantise_rows"
        )
    outputs, inputs = weight.shape
    if inputs % MULTIPLE or outputs % MULTIPLE:
        raise Fp8UnavailableError(
            f"fp8 products need widths that are multiples of {MULTIPLE}, not {inputs} -> {outputs}; "
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
        raise ValueError("fp8_linear has no gradient but x requires one; call it under torch.no_grad()")


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

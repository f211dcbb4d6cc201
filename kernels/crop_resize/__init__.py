"""Antialiased resizing, as in PIL, of a batch of crops of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels.crop_resize.reference import crop_resize as crop_resize_reference

INTERPOLATIONS = ("bilinear", "bicubic")
IMPLEMENTATIONS = ("auto", "cpu", "reference", "triton")


def crop_resize(
    pixels: Tensor,
    sizes: np.ndarray,
    output: tuple[int, int],
    *,
    interpolation: str = "bilinear",
    flip: np.ndarray | None = None,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    dtype: torch.dtype = torch.uint8,
    implementation: str = "auto",
) -> Tensor:
    """Returns the crops resized to `output` (height, width): (B, 3, h, w) on the device of `pixels`.

    The result is at most 1 level of 255 away from PIL's antialiased filter of that name, horizontal pass first. (On
    the CPU, one bicubic value in a million is 2 levels away.) Doesn't synchronise.

    Args:
        pixels: (bytes,) uint8: one crop after another without gaps, each (height, width, 3), row by row.
        sizes: (B, 2) integers on the host: height and width of each crop.
        output: height and width in pixels.
        interpolation: bilinear (triangle filter) or bicubic (a = -0.5).
        flip: (B,) bool on the host: which results are mirrored left to right.
        normalise: (scale, shift), 3 numbers each: returns level * scale[c] + shift[c]. By default returns levels.
        dtype: dtype of the result: uint8 (levels only), float32 or bfloat16.
        implementation: auto (triton on CUDA, cpu on the CPU), reference, triton or cpu.

    Raises:
        ValueError: shapes, dtypes or sizes don't fit together, or the implementation isn't available.
    """
    sizes = np.asarray(sizes)
    _check(pixels, sizes, output, interpolation, flip)
    scale, shift = ((1.0,) * 3, (0.0,) * 3) if normalise is None else (tuple(values) for values in normalise)
    if dtype not in (torch.uint8, torch.float32, torch.bfloat16) or (dtype == torch.uint8 and normalise is not None):
        raise ValueError(f"dtype is {dtype}; give float32 or bfloat16, or uint8 without normalise")
    if len(scale) != 3 or len(shift) != 3:
        raise ValueError(f"normalise has {len(scale)} and {len(shift)} numbers; give 3 and 3")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = "triton" if pixels.device.type == "cuda" else "cpu"
    if implementation == "triton":
        return _triton().crop_resize(
            pixels, sizes, output, interpolation=interpolation, flip=flip, normalise=(scale, shift), dtype=dtype
        )
    run = _on_cpu if implementation == "cpu" else crop_resize_reference
    levels = run(pixels, sizes, output, interpolation=interpolation, flip=flip)
    if dtype == torch.uint8:
        return levels
    if normalise is None:
        return levels.to(dtype)
    factors = [
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None] for values in (scale, shift)
    ]
    return levels.float().mul_(factors[0]).add_(factors[1]).to(dtype)


def warm_up(
    output: tuple[int, int],
    sides: tuple[int, int],
    *,
    interpolation: str = "bilinear",
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    dtype: torch.dtype = torch.uint8,
    device: torch.device,
) -> None:
    """Compiles what `crop_resize` runs on a GPU for crops of up to `sides` (height, width); elsewhere does nothing.

    Otherwise a kernel would be compiled in the first step whose crops need it. The arguments are those of
    `crop_resize`.
    """
    if device.type == "cuda":
        scale, shift = ((1.0,) * 3, (0.0,) * 3) if normalise is None else (tuple(values) for values in normalise)
        kernels = _triton()
        kernels.warm_up(
            output, sides, interpolation=interpolation, normalise=(scale, shift), dtype=dtype, device=device
        )


def _triton() -> Any:
    """Returns the module of the Triton kernel."""
    try:
        import ijepa_kernels.crop_resize.triton as kernels
    except ImportError as error:
        raise ValueError(
            f"Triton is needed for crop_resize on CUDA and can't be imported ({error}); install triton, "
            "or choose implementation='reference'"
        ) from None
    return kernels


def _on_cpu(
    pixels: Tensor, sizes: np.ndarray, output: tuple[int, int], *, interpolation: str, flip: np.ndarray | None
) -> Tensor:
    """Returns uint8 levels from PyTorch's own uint8 resizing, which is 25 times faster than the reference on one core.

    The reference resizes by matrix products.
    """
    images = torch.empty(len(sizes), 3, *output, dtype=torch.uint8)
    begin = 0
    for row, (height, width) in enumerate(sizes.tolist()):
        end = begin + 3 * height * width
        crop = pixels[begin:end].view(1, height, width, 3).permute(0, 3, 1, 2)
        begin = end
        resized = F.interpolate(crop, size=output, mode=interpolation, antialias=True)
        images[row] = (resized.flip(-1) if flip is not None and flip[row] else resized)[0]
    return images


def cost(sizes: np.ndarray, output: tuple[int, int], *, interpolation: str, bytes_per_value: int) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs (2 per multiply-add) of two separable passes.

    The kernel can't be faster than either of them allows. On every GPU that we know, bandwidth is the limit.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    height, width = output
    radius = 1 if interpolation == "bilinear" else 2
    taps = 2 * radius * np.maximum(1.0, sizes / np.array(output))  # (B, 2): vertical pass, horizontal pass
    read = 3 * (sizes[:, 0] * sizes[:, 1]).sum()
    written = 3.0 * bytes_per_value * len(sizes) * height * width
    flops = 6 * (sizes[:, 0] * width * taps[:, 1] + height * width * taps[:, 0]).sum()
    return {"read_bytes": float(read), "written_bytes": written, "flops": float(flops)}


def _check(
    pixels: Tensor, sizes: np.ndarray, output: tuple[int, int], interpolation: str, flip: np.ndarray | None
) -> None:
    if pixels.dim() != 1 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels are {tuple(pixels.shape)} {pixels.dtype}; give (bytes,) uint8")
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"sizes are {sizes.shape} {sizes.dtype}; give integers (B, 2)")
    if sizes.min(initial=1) < 1:
        raise ValueError(f"the smallest crop has {sizes.min()} pixels a side; give at least 1")
    needed = 3 * int((sizes[:, 0].astype(np.int64) * sizes[:, 1]).sum())
    if len(pixels) != needed:
        raise ValueError(f"crops of these sizes have {needed} bytes, pixels has {len(pixels)}; leave no gaps")
    if len(output) != 2 or min(output) < 1:
        raise ValueError(f"output is {output}; give (height, width) of at least 1 pixel")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    if flip is not None and np.shape(flip) != (len(sizes),):
        raise ValueError(f"flip is {np.shape(flip)} for {len(sizes)} images; give ({len(sizes)},)")


__all__ = ["IMPLEMENTATIONS", "INTERPOLATIONS", "cost", "crop_resize", "crop_resize_reference", "warm_up"]

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
    channels: int = 3,
    interpolation: str = "bilinear",
    flip: np.ndarray | None = None,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Returns the crops resized to `output` (height, width): (B, C, h, w) on the device of `pixels`.

    Of uint8 the result is at most 1 level of 255 away from PIL's antialiased filter of that name, horizontal pass
    first. (On the CPU, one bicubic value in a million is 2 levels away.) Values of uint16 and float32 aren't rounded,
    and those of uint16 are clamped to 0 ... 65535. Doesn't synchronise.

    Args:
        pixels: (values,) uint8, uint16 or float32: one crop after another without gaps, each (height, width, C), row
            by row.
        sizes: (B, 2) integers on the host: height and width of each crop.
        output: height and width in pixels.
        channels: C.
        interpolation: bilinear (triangle filter) or bicubic (a = -0.5).
        flip: (B,) bool on the host: which results are mirrored left to right.
        normalise: (scale, shift), C numbers each: returns value * scale[c] + shift[c]. By default returns the values.
        dtype: dtype of the result: float32, bfloat16, or uint8 for uint8 without `normalise`. None: uint8 of uint8,
            else float32.
        implementation: auto (triton on CUDA, cpu on the CPU), reference, triton or cpu.

    Raises:
        ValueError: shapes, dtypes or sizes don't fit together, or the implementation isn't available.
    """
    sizes = np.asarray(sizes)
    _check(pixels, sizes, output, channels, interpolation, flip)
    levels_wanted = pixels.dtype == torch.uint8 and normalise is None
    dtype = dtype or (torch.uint8 if levels_wanted else torch.float32)
    scale, shift = _factors(normalise, channels)
    if dtype not in (torch.uint8, torch.float32, torch.bfloat16) or (dtype == torch.uint8 and not levels_wanted):
        raise ValueError(f"dtype is {dtype}; give float32 or bfloat16, or uint8 for uint8 pixels without normalise")
    if len(scale) != channels or len(shift) != channels:
        raise ValueError(f"normalise has {len(scale)} and {len(shift)} numbers; give {channels} and {channels}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = "triton" if pixels.device.type == "cuda" else "cpu"
    if implementation == "triton":
        return _triton(channels, pixels.dtype).crop_resize(
            pixels, sizes, output, interpolation=interpolation, flip=flip, normalise=(scale, shift), dtype=dtype
        )
    run = _on_cpu if implementation == "cpu" else crop_resize_reference
    levels = run(pixels, sizes, output, channels=channels, interpolation=interpolation, flip=flip)
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
    channels: int = 3,
    pixel_dtype: torch.dtype = torch.uint8,
    interpolation: str = "bilinear",
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> None:
    """Compiles what `crop_resize` runs on a GPU for crops of up to `sides` (height, width); elsewhere does nothing.

    Otherwise a kernel would be compiled in the first step whose crops need it. `pixel_dtype` is that of the crops; the
    other arguments are those of `crop_resize`.
    """
    if device.type == "cuda":
        dtype = dtype or (torch.uint8 if pixel_dtype == torch.uint8 and normalise is None else torch.float32)
        kernels = _triton(channels, pixel_dtype)
        factors = _factors(normalise, channels)
        kernels.warm_up(output, sides, interpolation=interpolation, normalise=factors, dtype=dtype, device=device)


def _factors(
    normalise: tuple[Sequence[float], Sequence[float]] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns scale and shift of each channel."""
    if normalise is None:
        return (1.0,) * channels, (0.0,) * channels
    return tuple(normalise[0]), tuple(normalise[1])


def _triton(channels: int, pixel_dtype: torch.dtype) -> Any:
    """Returns the Triton kernel for these crops: the one for 8-bit RGB, or the one for a channel at a time."""
    try:
        if channels == 3 and pixel_dtype == torch.uint8:
            import ijepa_kernels.crop_resize.triton as kernels

            return kernels
        from ijepa_kernels.crop_resize.triton_channels import ChannelKernel

        return ChannelKernel(channels, pixel_dtype)
    except ImportError as error:
        raise ValueError(
            f"Triton is needed for crop_resize on CUDA and can't be imported ({error}); install triton, "
            "or choose implementation='reference'"
        ) from None


def _on_cpu(
    pixels: Tensor,
    sizes: np.ndarray,
    output: tuple[int, int],
    *,
    channels: int,
    interpolation: str,
    flip: np.ndarray | None,
) -> Tensor:
    """Returns values from PyTorch's own resizing, which is 25 times faster on uint8 than the reference on one core.

    The reference resizes by matrix products.
    """
    as_levels = pixels.dtype == torch.uint8
    images = torch.empty(len(sizes), channels, *output, dtype=torch.uint8 if as_levels else torch.float32)
    begin = 0
    for row, (height, width) in enumerate(sizes.tolist()):
        end = begin + channels * height * width
        crop = pixels[begin:end].view(1, height, width, channels).permute(0, 3, 1, 2)
        begin = end
        resized = F.interpolate(crop if as_levels else crop.float(), size=output, mode=interpolation, antialias=True)
        images[row] = (resized.flip(-1) if flip is not None and flip[row] else resized)[0]
    return images.clamp_(0.0, 65535.0) if pixels.dtype == torch.uint16 else images


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
    pixels: Tensor,
    sizes: np.ndarray,
    output: tuple[int, int],
    channels: int,
    interpolation: str,
    flip: np.ndarray | None,
) -> None:
    if pixels.dim() != 1 or pixels.dtype not in (torch.uint8, torch.uint16, torch.float32):
        raise ValueError(f"pixels are {tuple(pixels.shape)} {pixels.dtype}; give (values,) uint8, uint16 or float32")
    if channels < 1:
        raise ValueError(f"channels is {channels}; give at least 1")
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"sizes are {sizes.shape} {sizes.dtype}; give integers (B, 2)")
    if sizes.min(initial=1) < 1:
        raise ValueError(f"the smallest crop has {sizes.min()} pixels a side; give at least 1")
    needed = channels * int((sizes[:, 0].astype(np.int64) * sizes[:, 1]).sum())
    if len(pixels) != needed:
        raise ValueError(f"crops of these sizes have {needed} values, pixels has {len(pixels)}; leave no gaps")
    if len(output) != 2 or min(output) < 1:
        raise ValueError(f"output is {output}; give (height, width) of at least 1 pixel")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    if flip is not None and np.shape(flip) != (len(sizes),):
        raise ValueError(f"flip is {np.shape(flip)} for {len(sizes)} images; give ({len(sizes)},)")


__all__ = ["IMPLEMENTATIONS", "INTERPOLATIONS", "cost", "crop_resize", "crop_resize_reference", "warm_up"]

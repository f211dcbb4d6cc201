"""`crop_resize` as one kernel, which reads the uint8 crops once and writes the normalised images once.

A program computes a tile of one output image. It takes the input rows under the tile's filters a few at a time,
filters them horizontally, rounds them to levels as PIL does, and adds them to the output rows by a small matrix
product. It computes in float32: levels would be off by up to 2.9 of 255 with bfloat16 weights, by 0.1 with TF32.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _ROWS = 32, 16  # output pixels per side, and input rows at a time; tl.dot needs at least 16
_TAPS = 4  # the number of taps is rounded up to a multiple of this, so that few kernels are compiled
_RADIUS = {"bilinear": 1, "bicubic": 2}  # of the filter, in pixels of the coarser of the two images


@triton.jit
def _weight(distance, CUBIC: tl.constexpr):
    """Returns the filter's weight at `distance` >= 0; reference.py has the same formula and its source."""
    if CUBIC:
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        return tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    else:
        return tl.maximum(1.0 - distance, 0.0)


@triton.jit
def _level(value):
    """Returns the value rounded and clamped to what uint8 can hold."""
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)


@triton.jit
def _total(first, centre, stretch, size, TAPS: tl.constexpr, CUBIC: tl.constexpr):
    """Returns the sum of the weights of each output pixel, whose filter begins at input pixel `first`."""
    total = centre * 0.0
    for tap in range(TAPS):
        pixel = first + tap
        weight = _weight(tl.abs(pixel + 0.5 - centre) / stretch, CUBIC)
        total += tl.where((pixel >= 0) & (pixel < size), weight, 0.0)
    return tl.where(total == 0.0, 1.0, total)  # 0 for pixels outside the output, which are not stored


@triton.jit(do_not_specialize=["out_height", "out_width"])
def _kernel(
    pixels, crops, out, out_height, out_width,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    TAPS: tl.constexpr, CUBIC: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    begin = tl.load(crops + 4 * image)
    height = tl.load(crops + 4 * image + 1).to(tl.int32)
    width = tl.load(crops + 4 * image + 2).to(tl.int32)
    flipped = tl.load(crops + 4 * image + 3)
    radius = 2.0 if CUBIC else 1.0

    x = tl.program_id(2) * TILE + tl.arange(0, TILE)
    ratio_x = width.to(tl.float32) / out_width
    stretch_x = tl.maximum(ratio_x, 1.0)
    centre_x = (tl.where(flipped != 0, out_width - 1 - x, x).to(tl.float32) + 0.5) * ratio_x
    first_x = tl.floor(centre_x - radius * stretch_x).to(tl.int32)
    total_x = _total(first_x, centre_x, stretch_x, width, TAPS, CUBIC)

    y = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ratio_y = height.to(tl.float32) / out_height
    stretch_y = tl.maximum(ratio_y, 1.0)
    centre_y = (y.to(tl.float32) + 0.5) * ratio_y
    total_y = _total(tl.floor(centre_y - radius * stretch_y).to(tl.int32), centre_y, stretch_y, height, TAPS, CUBIC)

    last_y = tl.minimum(tl.program_id(1) * TILE + TILE, out_height) - 1
    top = tl.floor((tl.program_id(1) * TILE + 0.5) * ratio_y - radius * stretch_y).to(tl.int32)
    bottom = tl.floor((last_y.to(tl.float32) + 0.5) * ratio_y + radius * stretch_y).to(tl.int32) + 1
    top, bottom = tl.maximum(top, 0), tl.minimum(bottom, height)

    red = tl.zeros((TILE, TILE), tl.float32)
    green = tl.zeros((TILE, TILE), tl.float32)
    blue = tl.zeros((TILE, TILE), tl.float32)
    row = top
    while row < bottom:
        rows = row + tl.arange(0, ROWS)
        line = begin + rows.to(tl.int64)[:, None] * (3 * width)
        across_r = tl.zeros((ROWS, TILE), tl.float32)
        across_g = tl.zeros((ROWS, TILE), tl.float32)
        across_b = tl.zeros((ROWS, TILE), tl.float32)
        for tap in range(TAPS):
            column = first_x + tap
            weight = _weight(tl.abs(column + 0.5 - centre_x) / stretch_x, CUBIC) / total_x
            inside = (rows < height)[:, None] & ((column >= 0) & (column < width))[None, :]
            source = pixels + line + 3 * column[None, :]
            across_r += weight[None, :] * tl.load(source, mask=inside, other=0).to(tl.float32)
            across_g += weight[None, :] * tl.load(source + 1, mask=inside, other=0).to(tl.float32)
            across_b += weight[None, :] * tl.load(source + 2, mask=inside, other=0).to(tl.float32)
        down = _weight(tl.abs(rows[None, :] + 0.5 - centre_y[:, None]) / stretch_y, CUBIC) / total_y[:, None]
        down = tl.where((rows < height)[None, :], down, 0.0)
        red = tl.dot(down, _level(across_r), red, input_precision="ieee")
        green = tl.dot(down, _level(across_g), green, input_precision="ieee")
        blue = tl.dot(down, _level(across_b), blue, input_precision="ieee")
        row += ROWS

    plane = out_height.to(tl.int64) * out_width
    target = out + 3 * image * plane + y[:, None] * out_width + x[None, :]
    inside = (y < out_height)[:, None] & (x < out_width)[None, :]
    kind = out.dtype.element_ty
    tl.store(target, (_level(red) * scale_r + shift_r).to(kind), mask=inside)
    tl.store(target + plane, (_level(green) * scale_g + shift_g).to(kind), mask=inside)
    tl.store(target + 2 * plane, (_level(blue) * scale_b + shift_b).to(kind), mask=inside)


def crop_resize(
    pixels: Tensor,
    sizes: np.ndarray,
    output: tuple[int, int],
    *,
    interpolation: str,
    flip: np.ndarray | None,
    normalise: tuple[tuple[float, ...], tuple[float, ...]],
    dtype: torch.dtype,
) -> Tensor:
    """Returns (B, 3, h, w) of `dtype`: levels * normalise[0] + normalise[1], for checked arguments.

    Doesn't synchronise. Compiles once for each filter, dtype and range of shrinking factors.
    """
    out = torch.empty(len(sizes), 3, *output, dtype=dtype, device=pixels.device)
    if out.numel():
        taps = _taps(float((sizes / np.array(output)).max()), interpolation)
        _launch(pixels, sizes, out, interpolation=interpolation, flip=flip, normalise=normalise, taps=taps)
    return out


def warm_up(
    output: tuple[int, int],
    sides: tuple[int, int],
    *,
    interpolation: str,
    normalise: tuple[tuple[float, ...], tuple[float, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compiles every variant that `crop_resize` runs for crops of up to `sides` (height, width)."""
    out = torch.empty(1, 3, *output, dtype=dtype, device=device)
    pixels, one = torch.zeros(4, dtype=torch.uint8, device=device), np.ones((1, 2), dtype=np.int64)
    most = max(side / short for side, short in zip(sides, output, strict=True))
    for taps in range(_taps(1.0, interpolation), _taps(most, interpolation) + 1, _TAPS):
        for begin in (0, 1):  # Triton compiles again for pixels that begin at an odd byte, as micro-batches do
            crop = pixels[begin : begin + 3]
            _launch(crop, one, out, interpolation=interpolation, flip=None, normalise=normalise, taps=taps)


def _taps(shrinking: float, interpolation: str) -> int:
    """Returns the number of taps of a filter that shrinks by this factor, in steps of `_TAPS`."""
    widest = 2 * _RADIUS[interpolation] * max(1.0, shrinking)
    return -(-(math.ceil(widest) + 1) // _TAPS) * _TAPS


def _launch(
    pixels: Tensor,
    sizes: np.ndarray,
    out: Tensor,
    *,
    interpolation: str,
    flip: np.ndarray | None,
    normalise: tuple[tuple[float, ...], tuple[float, ...]],
    taps: int,
) -> None:
    """Writes the resized crops to `out`."""
    output = tuple(out.shape[2:])
    grid = (len(sizes), triton.cdiv(output[0], _TILE), triton.cdiv(output[1], _TILE))
    _kernel[grid](
        pixels, _crop_table(sizes, flip, pixels.device), out, *output, *normalise[0], *normalise[1],
        TAPS=taps, CUBIC=interpolation == "bicubic", TILE=_TILE, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


def _crop_table(sizes: np.ndarray, flip: np.ndarray | None, device: torch.device, channels: int = 3) -> Tensor:
    """Returns (B, 4) int64 on `device`: first value, height, width and flip of each crop."""
    table = np.zeros((len(sizes), 4), dtype=np.int64)
    table[1:, 0] = np.cumsum(channels * sizes[:-1, 0].astype(np.int64) * sizes[:-1, 1])
    table[:, 1:3] = sizes
    if flip is not None:
        table[:, 3] = flip
    crops = torch.from_numpy(table)
    return crops.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else crops.to(device)

"""`crop_resize` of any number of channels, of uint8, uint16 or float32, as one kernel with a program per channel.

It filters like the kernel for 8-bit RGB, whose loads of three neighbouring bytes it can't have. uint8 is rounded to
levels after each pass, as in PIL. The other types aren't rounded, and uint16 is clamped at the end.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels.crop_resize.triton import _ROWS, _TAPS, _TILE, _crop_table, _level, _taps, _total, _weight


@triton.jit(do_not_specialize=["out_height", "out_width"])
def _kernel(
    pixels, crops, factors, out, out_height, out_width,
    CHANNELS: tl.constexpr, LEVELS: tl.constexpr, CLAMPED: tl.constexpr,
    TAPS: tl.constexpr, CUBIC: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    plane_number = tl.program_id(0).to(tl.int64)
    image, channel = plane_number // CHANNELS, plane_number % CHANNELS
    begin = tl.load(crops + 4 * image) + channel
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

    total = tl.zeros((TILE, TILE), tl.float32)
    row = top
    while row < bottom:
        rows = row + tl.arange(0, ROWS)
        line = begin + rows.to(tl.int64)[:, None] * (CHANNELS * width)
        across = tl.zeros((ROWS, TILE), tl.float32)
        for tap in range(TAPS):
            column = first_x + tap
            weight = _weight(tl.abs(column + 0.5 - centre_x) / stretch_x, CUBIC) / total_x
            inside = (rows < height)[:, None] & ((column >= 0) & (column < width))[None, :]
            source = pixels + line + CHANNELS * column[None, :]
            across += weight[None, :] * tl.load(source, mask=inside, other=0).to(tl.float32)
        down = _weight(tl.abs(rows[None, :] + 0.5 - centre_y[:, None]) / stretch_y, CUBIC) / total_y[:, None]
        down = tl.where((rows < height)[None, :], down, 0.0)
        if LEVELS:
            across = _level(across)
        total = tl.dot(down, across, total, input_precision="ieee")
        row += ROWS

    if LEVELS:
        total = _level(total)
    if CLAMPED:
        total = tl.minimum(tl.maximum(total, 0.0), 65535.0)
    total = total * tl.load(factors + 2 * channel) + tl.load(factors + 2 * channel + 1)
    plane = out_height.to(tl.int64) * out_width
    target = out + plane_number * plane + y[:, None] * out_width + x[None, :]
    inside = (y < out_height)[:, None] & (x < out_width)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


class ChannelKernel:
    """The kernel for crops of `channels` channels of a type."""

    def __init__(self, channels: int, pixel_dtype: torch.dtype) -> None:
        self._channels, self._pixel_dtype = channels, pixel_dtype

    def crop_resize(
        self,
        pixels: Tensor,
        sizes: np.ndarray,
        output: tuple[int, int],
        *,
        interpolation: str,
        flip: np.ndarray | None,
        normalise: tuple[tuple[float, ...], tuple[float, ...]],
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns (B, C, h, w) of `dtype`: values * normalise[0] + normalise[1], for checked arguments.

        Doesn't synchronise. Compiles once for each filter, dtype and range of shrinking factors.
        """
        out = torch.empty(len(sizes), self._channels, *output, dtype=dtype, device=pixels.device)
        if out.numel():
            taps = _taps(float((sizes / np.array(output)).max()), interpolation)
            self._launch(pixels, sizes, out, interpolation=interpolation, flip=flip, normalise=normalise, taps=taps)
        return out

    def warm_up(
        self,
        output: tuple[int, int],
        sides: tuple[int, int],
        *,
        interpolation: str,
        normalise: tuple[tuple[float, ...], tuple[float, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Compiles every variant that `crop_resize` runs for crops of up to `sides` (height, width)."""
        out = torch.empty(1, self._channels, *output, dtype=dtype, device=device)
        pixels = torch.zeros(self._channels + 1, dtype=self._pixel_dtype, device=device)
        one = np.ones((1, 2), dtype=np.int64)
        most = max(side / short for side, short in zip(sides, output, strict=True))
        for taps in range(_taps(1.0, interpolation), _taps(most, interpolation) + 1, _TAPS):
            for begin in (0, 1):  # Triton compiles again for pixels that don't begin at a multiple of 16 bytes
                crop = pixels[begin : begin + self._channels]
                self._launch(crop, one, out, interpolation=interpolation, flip=None, normalise=normalise, taps=taps)

    def _launch(
        self,
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
        height, width = out.shape[2:]
        grid = (len(sizes) * self._channels, triton.cdiv(height, _TILE), triton.cdiv(width, _TILE))
        factors = torch.tensor(normalise, dtype=torch.float32).t().contiguous()  # (C, 2): scale and shift
        if pixels.device.type == "cuda":
            factors = factors.pin_memory().to(pixels.device, non_blocking=True)
        _kernel[grid](
            pixels, _crop_table(sizes, flip, pixels.device, self._channels), factors, out, height, width,
            CHANNELS=self._channels, LEVELS=self._pixel_dtype == torch.uint8,
            CLAMPED=self._pixel_dtype == torch.uint16, TAPS=taps, CUBIC=interpolation == "bicubic", TILE=_TILE,
            ROWS=_ROWS, num_warps=4,
        )  # fmt: skip


__all__ = ["ChannelKernel"]

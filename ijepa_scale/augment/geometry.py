"""PIL's geometric transforms of 8-bit images, batched, with parameters per image.

Each takes and returns (B, 3, H, W) uint8, within 1 level of PIL's result, computed in float32 and truncated as in PIL.
Pixels from outside an image become `fill` (3,) uint8, on the images' device. Nothing synchronises.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.augment.pipeline import to_device

_FLOAT_SLACK = 1e-3  # levels; float32 may end just below a whole number that PIL reaches in double precision
_MARGIN = 2  # pixels that the taps reach beyond the edge


def slide(images: Tensor, shifts: np.ndarray, fill: Tensor, *, interpolation: str = "bicubic") -> Tensor:
    """Returns the images with each row shifted: pixel x of row y comes from x + shifts[b, y].

    Equals PIL's Image.transform(AFFINE) for shears and translations along x; `shifts` (B, H) float64 are on the host.
    One gather of whole rows replaces a gather per tap and pixel. To shift columns, transpose the images.
    """
    width = images.shape[3]
    whole = np.floor(shifts)
    taps = _weights(to_device(torch.from_numpy((shifts - whole).astype(np.float32)), images.device), interpolation)
    begin, end = np.ceil(-0.5 - shifts), np.ceil(width - 0.5 - shifts)  # range of pixels whose centre is inside
    table = to_device(torch.from_numpy(np.stack([whole, begin, end]).astype(np.int64)), images.device)
    first, begin, end = table[:, :, None, :, None]  # (B, 1, H, 1) each
    columns = torch.arange(min(taps), width + max(taps), device=images.device)
    index = (first + columns).clamp_(0, width - 1)
    lines = images.gather(3, index.expand(-1, 3, -1, -1)).float()
    total: Tensor | float = 0.0
    for tap, weight in taps.items():
        total = total + weight[:, None, :, None] * lines.narrow(3, tap - min(taps), width)
    assert isinstance(total, Tensor)
    x = torch.arange(width, device=images.device)
    return torch.where((x >= begin) & (x < end), _levels(total), fill[None, :, None, None])


def affine(images: Tensor, matrices: Tensor, fill: Tensor, *, interpolation: str = "bicubic") -> Tensor:
    """Returns PIL's Image.transform(AFFINE): output pixel (x, y) comes from (ax + by + c, dx + ey + f).

    `matrices` (B, 6) float64 hold a, b, c, d, e, f, on the images' device; x and y are pixel centres.
    """
    count, _, height, width = images.shape
    device = images.device
    x = torch.arange(width, device=device, dtype=torch.float64) + 0.5
    y = (torch.arange(height, device=device, dtype=torch.float64) + 0.5)[:, None]
    a, b, c, d, e, f = (column[:, None, None] for column in matrices.unbind(1))
    source_x, source_y = a * x + b * y + c, d * x + e * y + f  # (B, H, W)
    outside = (source_x < 0) | (source_x >= width) | (source_y < 0) | (source_y >= height)
    packed, stride = _packed(images)
    column, across = _split(source_x, width, interpolation)
    row, down = _split(source_y, height, interpolation)
    base = ((row + _MARGIN) * stride + column + _MARGIN).flatten(1)
    shifts = torch.arange(0, 24, 8, dtype=torch.int32, device=device)[:, None]
    total = torch.zeros(count, 3, height * width, device=device)
    for row_tap, row_weight in down.items():
        line = torch.zeros_like(total)
        for tap, weight in across.items():
            # The margin keeps each tap at a constant offset from the base, so one index serves all taps; and one
            # gather fetches all colours.
            offset = row_tap * stride + tap
            pixels = packed.gather(1, base + offset)[:, None]
            line += ((pixels >> shifts) & 0xFF).float().mul_(weight.flatten(1)[:, None])
        total += line.mul_(row_weight.flatten(1)[:, None])
    return torch.where(outside[:, None], fill[None, :, None, None], _levels(total).view_as(images))


def _levels(values: Tensor) -> Tensor:
    return values.add_(_FLOAT_SLACK).clamp_(0, 255).to(torch.uint8)


def _packed(images: Tensor) -> tuple[Tensor, int]:
    """Returns (B, pixels) int32 with the three colours in a pixel's bytes, and the length of a line in pixels.

    Edges are repeated by `_MARGIN` pixels.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        index = torch.arange(-_MARGIN, size + _MARGIN, device=images.device).clamp_(0, size - 1)
        images = images.index_select(dim, index)
    red, green, blue = images.to(torch.int32).unbind(1)
    return (red | (green << 8) | (blue << 16)).flatten(1), images.shape[3]


def _split(coordinates: Tensor, length: int, interpolation: str) -> tuple[Tensor, dict[int, Tensor]]:
    """Returns, for each coordinate, the last pixel centred before it (int64) and the weights of the taps around it."""
    shifted = coordinates - 0.5
    first = shifted.floor()
    return first.long().clamp_(-1, length - 1), _weights((shifted - first).float(), interpolation)


def _weights(t: Tensor, interpolation: str) -> dict[int, Tensor]:
    """Returns the weight of each tap, -1 to 2, at distance t in [0, 1) after tap 0.

    The cubic has a = -1, as in PIL's geometric transforms (PIL's resize has -0.5).
    """
    if interpolation == "bilinear":
        return {0: 1 - t, 1: t}
    t2, t3 = t * t, t * t * t
    return {-1: -t + 2 * t2 - t3, 0: 1 - 2 * t2 + t3, 1: t + t2 - t3, 2: t3 - t2}

"""PIL's operations on 8-bit images, batched, with a parameter per image.

Each takes and returns (B, 3, H, W) uint8, and equals PIL's operation of the same name, in most cases bit for bit:
it rounds and truncates as PIL does. Parameters are (B,) tensors on the images' device. Nothing synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 256
_LUMA = (19595, 38470, 7471)  # ITU-R BT.601 in units of 1/65536, as in PIL's conversion to "L"


def luma(images: Tensor) -> Tensor:
    """Returns (B, 1, H, W) uint8: PIL's convert("L")."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def blend(first: Tensor, second: Tensor, alpha: Tensor) -> Tensor:
    """Returns first + alpha * (second - first), clipped and truncated, as in PIL's Image.blend; alpha is (B,) float32.

    `first` may have any shape that expands to the images `second`.
    """
    start = first.float()
    mixed = second.float().sub_(start).mul_(alpha[:, None, None, None]).add_(start)
    return mixed.clamp_(0, 255).to(torch.uint8)


def invert(images: Tensor) -> Tensor:
    """Returns 255 - images."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Returns the images with only the `bits` (B,) int64 highest bits kept; 0 keeps none."""
    mask = (0xFF << (8 - bits)) & 0xFF
    return images & mask.to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Returns the images with levels of at least `threshold` (B,) int64 inverted."""
    return torch.where(images.to(torch.int16) >= threshold.to(torch.int16)[:, None, None, None], 255 - images, images)


def solarize_add(images: Tensor, add: Tensor, *, threshold: int = 128) -> Tensor:
    """Returns the images with `add` (B,) int64 added to levels below `threshold`, at most 255."""
    raised = (images.to(torch.int16) + add.to(torch.int16)[:, None, None, None]).clamp_(max=255).to(torch.uint8)
    return torch.where(images < threshold, raised, images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Returns PIL's ImageEnhance.Color: moves images away from their luma by `factor` (B,) float32."""
    return blend(luma(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Returns PIL's ImageEnhance.Contrast: moves images away from their rounded mean luma by `factor` (B,) float32."""
    mean = luma(images).flatten(1).double().mean(dim=1)
    return blend((mean + 0.5).floor()[:, None, None, None], images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Returns PIL's ImageEnhance.Brightness: moves images away from black by `factor` (B,) float32."""
    return blend(images.new_zeros(1), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Returns PIL's ImageEnhance.Sharpness: moves images away from smoothed ones by `factor` (B,) float32.

    PIL's SMOOTH filter gives the pixel weight 5 and its 8 neighbours weight 1, rounds, and leaves the border unchanged.
    """
    smooth = images.clone()
    if min(images.shape[-2:]) > 2:
        whole = images.float()
        rows = whole[..., :-2, :] + whole[..., 1:-1, :] + whole[..., 2:, :]
        sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * whole[..., 1:-1, 1:-1]
        smooth[..., 1:-1, 1:-1] = (sums / 13 + 0.5).floor().clamp_(0, 255).to(torch.uint8)
    return blend(smooth, images, factor)


def autocontrast(images: Tensor) -> Tensor:
    """Returns PIL's ImageOps.autocontrast: stretches each channel to 0 .. 255."""
    flat = images.flatten(2)
    low, high = (edge.double()[..., None] for edge in (flat.amin(2), flat.amax(2)))
    levels = torch.arange(_LEVELS, device=images.device, dtype=torch.float64)
    spread = high - low
    scale = 255.0 / torch.where(spread > 0, spread, 1.0)
    table = (levels * scale - low * scale).trunc().clamp_(0, 255)
    return _look_up(images, torch.where(spread > 0, table, levels))


def equalize(images: Tensor) -> Tensor:
    """Returns PIL's ImageOps.equalize: flattens the histogram of each channel."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], _LEVELS, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    used = counts > 0
    highest = (_LEVELS - 1) - used.flip(2).to(torch.int8).argmax(dim=2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    levels = torch.arange(_LEVELS, device=images.device)
    unchanged = (used.sum(2, keepdim=True) <= 1) | (step == 0)
    return _look_up(images, torch.where(unchanged, levels, table))


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Returns table[b, c, level] for each pixel; the table is (B, 3, 256)."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)

"""Colour operations on batches (B, 3, H, W) of floating-point images in [0, 1], with a factor per image.

Each equals torchvision's operation of the same name on one floating-point image. Factors are (B, 1, 1, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIDDLE = 127.5 / 255.0  # between levels 127 and 128
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with the digits that torchvision keeps


def grayscale(images: Tensor) -> Tensor:
    """Returns the luma, (B, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Returns the images times `factor`, clamped."""
    return (images * factor).clamp_(0.0, 1.0)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Returns the images moved away from their mean luma by `factor`, clamped."""
    return _blend(images, grayscale(images).mean(dim=(2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Returns the images moved away from their luma by `factor`, clamped."""
    return _blend(images, grayscale(images), factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Returns the images with their HSV hue rotated by `shift`, a fraction of the full circle.

    Source: A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978 (the hexcone model).
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    turned = sector + 6.0 * shift[:, 0]  # in sixths of the circle
    # Each channel of the hexcone is the value minus a share of chroma that rises and falls once around the circle.
    offset = torch.arange(5.0, 0.0, -2.0, device=images.device).view(1, 3, 1, 1)  # for red, green, blue
    angle = (offset + turned[:, None]).remainder(6.0)
    share = torch.minimum(angle, 4.0 - angle).clamp_(0.0, 1.0)
    return value[:, None] - chroma[:, None] * share


def solarize(images: Tensor) -> Tensor:
    """Returns the images with levels of 128 and above (of 255) inverted, as in PIL's ImageOps.solarize."""
    return torch.where(images >= _MIDDLE, 1.0 - images, images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Returns factor * images + (1 - factor) * other, clamped."""
    return (other + factor * (images - other)).clamp_(0.0, 1.0)

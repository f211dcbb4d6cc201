"""RandAugment of a batch: each image has its own keyed draws, and each operation runs once per layer.

Sources: arXiv 1909.13719 (RandAugment); operations, ranges and notation are those of timm's "increasing" set,
which the finetuning recipe of arXiv 2111.06377 uses as `rand-m9-mstd0.5-inc1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_scale import rng
from ijepa_scale.augment import geometry, levels
from ijepa_scale.augment.pipeline import change_rows, to_device
from ijepa_scale.config.rand_augment_notation import LEVELS, RandAugmentSettings

_OP, _APPLY, _RADIUS, _ANGLE, _NEGATE, _DRAWS = range(6)  # columns of a layer's draws
_TRANSLATE = 0.45  # fraction of the side at magnitude 10


@dataclass(frozen=True)
class Canvas:
    """Settings of geometric operations other than the magnitude."""

    fill: Tensor  # (3,) uint8, on the images' device: fills pixels from outside an image
    interpolation: str  # bilinear | bicubic


Operation = Callable[[Tensor, np.ndarray, Canvas], Tensor]  # (images (B, 3, H, W) uint8, values (B,) float64, canvas)


class RandAugment:
    """Applies one of `OPERATIONS` to each image in each layer, with the probability of the settings.

    Geometric operations fill empty pixels with `fill` (R, G, B levels); `interpolation` is bilinear or bicubic.
    """

    def __init__(
        self,
        settings: RandAugmentSettings,
        *,
        seed: int,
        fill: tuple[int, int, int],
        interpolation: str = "bicubic",
    ) -> None:
        self.settings, self._seed, self._interpolation = settings, seed, interpolation
        self._fill = torch.tensor(fill, dtype=torch.uint8)

    def __call__(self, images: Tensor, *, epoch: int, sample_ids: np.ndarray) -> Tensor:
        """Returns (B, 3, H, W) uint8 images; may change `images` in place. Doesn't synchronise."""
        canvas = Canvas(to_device(self._fill, images.device), self._interpolation)
        for operations, values in self.draw(epoch=epoch, sample_ids=sample_ids):
            for number, operation in enumerate(OPERATIONS.values()):
                rows = np.flatnonzero(operations == number)
                change_rows(images, rows, operation, values[rows], canvas)
        return images

    def draw(self, *, epoch: int, sample_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns, for each layer, the operations (B,) int64 (-1 for none) and their signed magnitudes (B,) float64."""
        settings = self.settings
        draws = rng.uniform(self._seed, "rand_augment", epoch, sample_ids, _DRAWS * settings.num_layers)
        layers = []
        for layer in draws.reshape(len(sample_ids), settings.num_layers, _DRAWS).swapaxes(0, 1):
            chosen = (layer[:, _OP] * len(OPERATIONS)).astype(np.int64)
            operations = np.where(layer[:, _APPLY] < settings.probability, chosen, -1)
            if math.isinf(settings.magnitude_std):
                values = settings.magnitude * layer[:, _RADIUS]
            else:  # normal numbers by the Box-Muller transform
                normal = np.sqrt(-2.0 * np.log1p(-layer[:, _RADIUS])) * np.cos(2.0 * math.pi * layer[:, _ANGLE])
                values = settings.magnitude + settings.magnitude_std * normal
            values = np.clip(values, 0.0, settings.magnitude_max)
            layers.append((operations, np.where(layer[:, _NEGATE] < 0.5, values, -values)))
        return layers


def _to_images_device(images: Tensor, values: np.ndarray, dtype: type) -> Tensor:
    return to_device(torch.from_numpy(values.astype(dtype)), images.device)


def posterize_bits(values: np.ndarray) -> np.ndarray:
    """Returns the bits kept: 4 down to 0 as the magnitude grows."""
    return 4 - (np.abs(values) / LEVELS * 4).astype(np.int64)


def solarize_threshold(values: np.ndarray) -> np.ndarray:
    """Returns the threshold: 256 (nothing) down to 0 (everything) as the magnitude grows."""
    return 256 - np.minimum(256, (np.abs(values) / LEVELS * 256).astype(np.int64))


def solarize_addend(values: np.ndarray) -> np.ndarray:
    """Returns the amount to add to dark levels: 0 to 110."""
    return np.minimum(128, (np.abs(values) / LEVELS * 110).astype(np.int64))


def rotation(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns matrices (B, 6) that rotate images of `size` (height, width) about their centre by up to 30 degrees."""
    angle = -np.radians(values / LEVELS * 30.0)
    cosine, sine = np.cos(angle).round(15), np.sin(angle).round(15)
    x, y = size[1] / 2, size[0] / 2
    return np.stack([cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y], axis=1)


def shear(values: np.ndarray, num_lines: int) -> np.ndarray:
    """Returns the shift in pixels (B, num_lines) of each line along itself: up to 0.3 per line."""
    return (values / LEVELS * 0.3)[:, None] * (np.arange(num_lines) + 0.5)


def translation(values: np.ndarray, num_lines: int, *, length: int) -> np.ndarray:
    """Returns the shift in pixels (B, num_lines) of each line along itself: up to 0.45 of its length."""
    return np.broadcast_to((values / LEVELS * _TRANSLATE * length)[:, None], (len(values), num_lines))


def _rotate(images: Tensor, values: np.ndarray, canvas: Canvas) -> Tensor:
    matrices = _to_images_device(images, rotation(values, (images.shape[2], images.shape[3])), np.float64)
    return geometry.affine(images, matrices, canvas.fill, interpolation=canvas.interpolation)


def _slide(images: Tensor, shifts: np.ndarray, canvas: Canvas) -> Tensor:
    return geometry.slide(images, shifts, canvas.fill, interpolation=canvas.interpolation)


def _shear_x(images: Tensor, values: np.ndarray, canvas: Canvas) -> Tensor:
    return _slide(images, shear(values, images.shape[2]), canvas)


def _translate_x(images: Tensor, values: np.ndarray, canvas: Canvas) -> Tensor:
    return _slide(images, translation(values, images.shape[2], length=images.shape[3]), canvas)


def _factors(images: Tensor, values: np.ndarray) -> Tensor:
    """Returns enhancement factors: 1 at magnitude 0, towards 0.1 or 1.9 as the magnitude grows."""
    return _to_images_device(images, np.maximum(0.1, 1.0 + 0.9 * values / LEVELS), np.float32)


def _int64(images: Tensor, values: np.ndarray) -> Tensor:
    return _to_images_device(images, values, np.int64)


# In timm's order, under timm's names. Values are signed magnitudes; only some operations use the sign.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda images, values, _: levels.autocontrast(images),
    "Equalize": lambda images, values, _: levels.equalize(images),
    "Invert": lambda images, values, _: levels.invert(images),
    "Rotate": _rotate,
    "PosterizeIncreasing": lambda images, values, _: levels.posterize(images, _int64(images, posterize_bits(values))),
    "SolarizeIncreasing": lambda images, values, _: levels.solarize(images, _int64(images, solarize_threshold(values))),
    "SolarizeAdd": lambda images, values, _: levels.solarize_add(images, _int64(images, solarize_addend(values))),
    "ColorIncreasing": lambda images, values, _: levels.color(images, _factors(images, values)),
    "ContrastIncreasing": lambda images, values, _: levels.contrast(images, _factors(images, values)),
    "BrightnessIncreasing": lambda images, values, _: levels.brightness(images, _factors(images, values)),
    "SharpnessIncreasing": lambda images, values, _: levels.sharpness(images, _factors(images, values)),
    "ShearX": _shear_x,
    "ShearY": lambda images, values, canvas: _shear_x(images.mT, values, canvas).mT,
    "TranslateXRel": _translate_x,
    "TranslateYRel": lambda images, values, canvas: _translate_x(images.transpose(2, 3), values, canvas).transpose(
        2, 3
    ),
}

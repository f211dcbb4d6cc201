"""RandAugment of a batch, each image by its own keyed draws, each operation once per layer. Floor 2.

Sources: arXiv 1909.13719 (RandAugment); operations, ranges and notation are those of timm's "increasing" set,
which the finetuning recipe of arXiv 2111.06377 names `rand-m9-mstd0.5-inc1`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_scale import rng
from ijepa_scale.augment import levels
from ijepa_scale.augment.pipeline import to_device
from ijepa_scale.errors import ConfigError

LEVELS = 10.0  # the magnitude at which operations are at the end of their range
_OP, _APPLY, _RADIUS, _ANGLE, _NEGATE, _DRAWS = range(6)  # columns of a layer's draws
_TRANSLATE = 0.45  # share of the side at magnitude 10
_FIELD = re.compile(r"(mstd|mmax|m|n|p|inc)(\d+(?:\.\d+)?)")

Operation = Callable[[Tensor, np.ndarray], Tensor]  # (images (B, 3, H, W) uint8, values (B,) float64) -> images


@dataclass(frozen=True, kw_only=True)
class RandAugmentSettings:
    """What timm's notation says."""

    magnitude: float = 10.0
    num_layers: int = 2
    probability: float = 0.5  # that a layer does something
    magnitude_std: float = 0.0  # of normal noise on the magnitude
    magnitude_max: float = LEVELS  # where it is cut


def parse(text: str) -> RandAugmentSettings:
    """Returns the settings of timm's notation, such as rand-m9-mstd0.5-inc1 (fields m, n, p, mstd, mmax, inc1).

    Raises:
        ConfigError: another notation, or another set of operations than the increasing one.
    """
    first, *fields = text.split("-")
    found: dict[str, float] = {}
    for field in fields:
        match = _FIELD.fullmatch(field)
        if match is None:
            raise ConfigError(
                f"augment.rand_augment is {text!r}, of which {field!r} isn't known; give fields m, n, p, mstd, mmax "
                "and inc1, e.g. rand-m9-mstd0.5-inc1"
            )
        found[match[1]] = float(match[2])
    if first != "rand" or found.get("inc") != 1:
        raise ConfigError(
            f"augment.rand_augment is {text!r}; give rand-...-inc1: only the operations that grow with the magnitude "
            "are there, e.g. rand-m9-mstd0.5-inc1"
        )
    return RandAugmentSettings(
        magnitude=found.get("m", LEVELS),
        num_layers=int(found.get("n", 2)),
        probability=found.get("p", 0.5),
        magnitude_std=found.get("mstd", 0.0),
        magnitude_max=found.get("mmax", LEVELS),
    )


class RandAugment:
    """Applies, in each layer, one of `OPERATIONS` to each image with the settings' probability.

    `fill` (R, G, B levels) is what geometric operations leave empty. Their resampling is bicubic.
    """

    def __init__(self, settings: RandAugmentSettings, *, seed: int, fill: tuple[int, int, int]) -> None:
        self.settings, self._seed = settings, seed
        self._fill = torch.tensor(fill, dtype=torch.uint8)

    def __call__(self, images: Tensor, *, epoch: int, sample_ids: np.ndarray) -> Tensor:
        """Returns (B, 3, H, W) uint8 images; the given ones may change. Doesn't synchronise."""
        fill = to_device(self._fill, images.device)
        for operations, values in self.draw(epoch=epoch, sample_ids=sample_ids):
            for number, (name, operation) in enumerate(OPERATIONS.items()):
                rows = np.flatnonzero(operations == number)
                if not len(rows):
                    continue
                index = to_device(torch.from_numpy(rows), images.device)
                chosen = images.index_select(0, index)
                if name in GEOMETRIC:
                    matrices = GEOMETRIC[name](values[rows], (images.shape[-2], images.shape[-1]))
                    changed = levels.affine(chosen, to_device(torch.from_numpy(matrices), images.device), fill)
                else:
                    changed = operation(chosen, values[rows])
                images.index_copy_(0, index, changed)
        return images

    def draw(self, *, epoch: int, sample_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each layer the operations (B,) int64, -1 for none, and their signed magnitudes (B,) float64."""
        settings = self.settings
        draws = rng.uniform(self._seed, "rand_augment", epoch, sample_ids, _DRAWS * settings.num_layers)
        layers = []
        for layer in draws.reshape(len(sample_ids), settings.num_layers, _DRAWS).swapaxes(0, 1):
            chosen = (layer[:, _OP] * len(OPERATIONS)).astype(np.int64)
            operations = np.where(layer[:, _APPLY] < settings.probability, chosen, -1)
            # Box and Muller's normal numbers
            normal = np.sqrt(-2.0 * np.log1p(-layer[:, _RADIUS])) * np.cos(2.0 * math.pi * layer[:, _ANGLE])
            values = np.clip(settings.magnitude + settings.magnitude_std * normal, 0.0, settings.magnitude_max)
            layers.append((operations, np.where(layer[:, _NEGATE] < 0.5, values, -values)))
        return layers


def _on(images: Tensor, values: np.ndarray, dtype: type) -> Tensor:
    return to_device(torch.from_numpy(values.astype(dtype)), images.device)


def _factors(images: Tensor, values: np.ndarray) -> Tensor:
    """Returns factors that go from 1 towards 0.1 or 1.9."""
    return _on(images, np.maximum(0.1, 1.0 + 0.9 * values / LEVELS), np.float32)


def posterize_bits(values: np.ndarray) -> np.ndarray:
    """Returns the bits kept: 4 down to 0 as the magnitude grows."""
    return 4 - (np.abs(values) / LEVELS * 4).astype(np.int64)


def solarize_threshold(values: np.ndarray) -> np.ndarray:
    """Returns the threshold: 256 (nothing) down to 0 (everything) as the magnitude grows."""
    return 256 - np.minimum(256, (np.abs(values) / LEVELS * 256).astype(np.int64))


def solarize_addend(values: np.ndarray) -> np.ndarray:
    """Returns what is added to dark levels: 0 to 110."""
    return np.minimum(128, (np.abs(values) / LEVELS * 110).astype(np.int64))


def _matrix(size: int, **entries: np.ndarray | float) -> np.ndarray:
    """Returns (B, 6) float64: the identity with some of the entries a to f replaced."""
    whole = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 1.0, "f": 0.0, **entries}
    return np.stack([np.broadcast_to(np.asarray(value, dtype=np.float64), (size,)) for value in whole.values()], axis=1)


def rotation(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns matrices (B, 6) that turn images of `size` (height, width) about their centre by up to 30 degrees."""
    angle = -np.radians(values / LEVELS * 30.0)
    cosine, sine = np.cos(angle).round(15), np.sin(angle).round(15)
    x, y = size[1] / 2, size[0] / 2
    shifts = {"c": x - cosine * x - sine * y, "f": y + sine * x - cosine * y}
    return _matrix(len(values), a=cosine, b=sine, d=-sine, e=cosine, **shifts)


def _shear(values: np.ndarray, name: str) -> np.ndarray:
    return _matrix(len(values), **{name: values / LEVELS * 0.3})


def _translate(values: np.ndarray, name: str, side: int) -> np.ndarray:
    return _matrix(len(values), **{name: values / LEVELS * _TRANSLATE * side})


# From signed magnitudes and the images' (height, width) to matrices (B, 6).
GEOMETRIC: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "Rotate": rotation,
    "ShearX": lambda values, size: _shear(values, "b"),
    "ShearY": lambda values, size: _shear(values, "d"),
    "TranslateXRel": lambda values, size: _translate(values, "c", size[1]),
    "TranslateYRel": lambda values, size: _translate(values, "f", size[0]),
}


def _geometric(images: Tensor, values: np.ndarray) -> Tensor:
    raise AssertionError("goes through GEOMETRIC, which knows the sizes and the fill")


# In timm's order, under timm's names. Values are magnitudes with a sign, which only some of them read.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda images, values: levels.autocontrast(images),
    "Equalize": lambda images, values: levels.equalize(images),
    "Invert": lambda images, values: levels.invert(images),
    "Rotate": _geometric,
    "PosterizeIncreasing": lambda images, values: levels.posterize(
        images, _on(images, posterize_bits(values), np.int64)
    ),
    "SolarizeIncreasing": lambda images, values: levels.solarize(
        images, _on(images, solarize_threshold(values), np.int64)
    ),
    "SolarizeAdd": lambda images, values: levels.solarize_add(images, _on(images, solarize_addend(values), np.int64)),
    "ColorIncreasing": lambda images, values: levels.color(images, _factors(images, values)),
    "ContrastIncreasing": lambda images, values: levels.contrast(images, _factors(images, values)),
    "BrightnessIncreasing": lambda images, values: levels.brightness(images, _factors(images, values)),
    "SharpnessIncreasing": lambda images, values: levels.sharpness(images, _factors(images, values)),
    "ShearX": _geometric,
    "ShearY": _geometric,
    "TranslateXRel": _geometric,
    "TranslateYRel": _geometric,
}

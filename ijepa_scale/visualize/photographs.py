"""The images of a picture: as an encoder takes them, and as people see them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.augment.eval_transform import EvalTransform
from ijepa_scale.config.data import CropConfig
from ijepa_scale.data.eval_reader import spread
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.frozen import ImageTransform
from ijepa_scale.evaluate.image_sets import ImageSet
from ijepa_scale.train.picture import viewable

logger = logging.getLogger(__name__)

_SHOWN_SIDE = 336  # pixels: the shorter side of a shown image is at least this


class Photographs:
    """Images of a set that can be read, cut as the encoder's transform cuts them."""

    def __init__(self, images: ImageSet, transform: ImageTransform) -> None:
        self._images, self._transform = images, transform
        height, width = transform.image_size
        times = max(1, -(-_SHOWN_SIDE // min(height, width)))
        self._colors = CropConfig(mean=transform.mean, std=transform.std)
        self._enlarge = EvalTransform(
            (times * height, times * width), transform.crop_fraction, mean=transform.mean, std=transform.std,
            pixels=transform.format,
        )  # fmt: skip

    @classmethod
    def of(cls, paths: Sequence[str], reader: str | None, transform: ImageTransform) -> Photographs:
        """Returns the images that paths name, see `ImageSet.of`; warns about folders that can't be listed."""
        images = ImageSet.of(paths, reader)
        for problem in images.problems:
            logger.warning("%s", problem)
        return cls(images, transform)

    def spread(self, count: int) -> list[int]:
        """Returns the numbers of up to `count` images, spread evenly over the set."""
        return spread(len(self._images), min(count, len(self._images))).tolist()

    def name(self, number: int) -> str:
        """Returns an image's path, or its name in a shard."""
        return self._images.name(number)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the number and pixels of each image that can be used; warns about the others.

        Raises:
            DataError: none can be used.
        """
        faults = []
        for number in numbers:
            try:
                yield number, self._transform.pixels(self._images.read(number))
            except DataError as error:
                faults.append(f"{self._images.name(number)}: {error}")
        if faults and len(faults) == len(numbers):
            raise DataError(f"none of {len(faults)} images can be used; the first: {faults[0]}")
        if faults:
            logger.warning("%d of %d images can't be used; the first: %s", len(faults), len(numbers), faults[0])

    def some(self, count: int) -> list[int]:
        """Returns the numbers of up to `count` usable images, spread evenly over the set."""
        return [number for number, _ in self.read(self.spread(count))]

    def inputs(self, numbers: Sequence[int]) -> Tensor:
        """Returns the encoder's input (B, C, h, w), float32."""
        return self._transform([pixels for _, pixels in self.read(numbers)])

    def shown(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns RGB images (B, H, W, 3), float32 in [0, 1], of the same cut; H and W are multiples of the input's."""
        images = self._enlarge([pixels for _, pixels in self.read(numbers)])
        return viewable(images, self._colors, self._transform.format).permute(0, 2, 3, 1).numpy()

    def folder(self, number: int) -> str:
        """Returns the name of the folder that an image is in: often its class."""
        return PurePath(self._images.name(number)).parent.name

    def batches(self, numbers: Sequence[int], size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yields usable images as encoder's input, up to `size` at a time, with their numbers."""
        kept: list[int] = []
        pixels: list[np.ndarray] = []
        for number, image in self.read(numbers):
            kept.append(number)
            pixels.append(image)
            if len(kept) == size:
                yield kept, self._transform(pixels)
                kept, pixels = [], []
        if kept:
            yield kept, self._transform(pixels)


def on_page(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Returns a value for each pixel (B, H, W) of shown images from those of patches (B, rows, columns): no blur."""
    enlarged = torch.nn.functional.interpolate(values[:, None].float().cpu(), size=size, mode="nearest-exact")
    return enlarged[:, 0].numpy()

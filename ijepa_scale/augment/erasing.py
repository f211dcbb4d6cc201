"""Random erasing: fills a rectangle of some images with noise, by each image's own keyed draws.

Noise is drawn for the erased pixels only, and on the host, so that every device gets the same numbers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ijepa_scale import rng
from ijepa_scale.augment.pipeline import to_device

TRIES = 10
AREA = (0.02, 1 / 3)  # as a fraction of the image
ASPECT = (0.3, 1 / 0.3)  # height / width, log-uniform
_DRAWS = 1 + 4 * TRIES  # whether to erase, then area, aspect, top and left for each try


class RandomErasing:
    """With a given probability, fills one rectangle with normal noise, independent in each pixel and channel.

    Source: arXiv 1708.04896; the limits and the "pixel" noise are timm's, as used by the recipe of arXiv 2111.06377.
    """

    def __init__(self, probability: float, *, seed: int) -> None:
        self.probability, self._seed = probability, seed

    def __call__(self, images: Tensor, *, epoch: int, sample_ids: np.ndarray) -> Tensor:
        """Erases rectangles of the normalised images (B, C, h, w) in place and returns them. Doesn't synchronise."""
        boxes = self.draw((images.shape[-2], images.shape[-1]), epoch=epoch, sample_ids=sample_ids)
        for row in np.flatnonzero(boxes[:, 2]).tolist():
            top, left, height, width = boxes[row].tolist()
            key = rng.key(self._seed, "erase.noise", epoch, int(sample_ids[row]))
            numbers = np.random.Generator(np.random.Philox(key=key))
            noise = torch.from_numpy(numbers.standard_normal((images.shape[1], height, width), dtype=np.float32))
            images[row, :, top : top + height, left : left + width] = to_device(noise, images.device)
        return images

    def draw(self, size: tuple[int, int], *, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
        """Returns boxes (B, 4) int64 of top, left, height and width in pixels; height 0 means nothing is erased."""
        draws = rng.uniform(self._seed, "erase", epoch, sample_ids, _DRAWS)
        erased = draws[:, 0] < self.probability
        tries = draws[:, 1:].reshape(-1, TRIES, 4)
        area = size[0] * size[1] * (AREA[0] + (AREA[1] - AREA[0]) * tries[..., 0])
        low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
        aspect = np.exp(low + (high - low) * tries[..., 1])
        heights, widths = (np.rint(np.sqrt(area * ratio)).astype(np.int64) for ratio in (aspect, 1.0 / aspect))
        fits = (heights < size[0]) & (widths < size[1])
        first = fits.argmax(axis=1)
        rows = np.arange(len(draws))
        height, width = heights[rows, first], widths[rows, first]
        top = (tries[rows, first, 2] * (size[0] - height + 1)).astype(np.int64)
        left = (tries[rows, first, 3] * (size[1] - width + 1)).astype(np.int64)
        boxes = np.stack([top, left, height, width], axis=1)
        return np.where((erased & fits.any(axis=1))[:, None], boxes, 0)

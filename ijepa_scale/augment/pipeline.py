"""The pretraining augmentation: turns a batch of crops into normalised images, on the device.

What happens to a sample depends on (seed, epoch, sample id) alone. All draws are made on the host, so choosing samples
and sizes never synchronises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_kernels.crop_resize import crop_resize, warm_up
from ijepa_scale import rng
from ijepa_scale.augment import color
from ijepa_scale.augment.blur import GaussianBlur
from ijepa_scale.config.data import AugmentConfig
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import longest_sides

# Columns of a sample's draws. Add new columns at the end, so that the earlier draws don't change.
_FLIP, _JITTER, _FACTORS, _ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _DRAWS = (
    0,
    1,
    slice(2, 6),
    slice(6, 10),
    10,
    11,
    12,
    13,
    14,
)
_STRENGTHS = np.array([0.8, 0.8, 0.8, 0.2])  # brightness, contrast, saturation, hue at strength 1; SimCLR, app. A
_OPERATIONS = (color.brightness, color.contrast, color.saturation, color.hue)
_SIGMAS = (0.1, 2.0)  # pixels; SimCLR, appendix A


class Augment:
    """Applies resize, flip, colour jitter, grayscale, blur, solarize and normalisation; what is set to 0 costs nothing.

    Sources: the order of operations is SimCLR's (arXiv 2002.05709, appendix A), solarize last as in BYOL
    (arXiv 2006.07733, appendix B).
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: tuple[int, int],
        *,
        seed: int,
        pixels: PixelFormat = RGB8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.image_size, self.seed = config, image_size, seed
        self.device = torch.device(device)
        self._white = pixels.white
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in config.normalisation)
        self._scale, self._shift = (1.0 / (self._white * std)).float(), (-mean / std).float()  # (C,) on the host
        self._cold = True  # the resizing kernels aren't compiled yet
        self._blur = GaussianBlur(image_size, max_sigma=_SIGMAS[1], device=self.device) if config.blur else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Returns (B, C, h, w) float32 normalised images on this object's device; doesn't synchronise.

        The first call compiles the kernels for crops of all sizes.
        """
        batch = batch.to(self.device)
        config = self.config
        draws = rng.uniform(self.seed, "augment", batch.epoch, batch.sample_ids, _DRAWS)
        flip = draws[:, _FLIP] < config.flip if config.flip else None
        changes = config.color_jitter or config.grayscale or config.solarize or self._blur is not None
        options: dict[str, Any] = {"interpolation": config.interpolation, "channels": batch.channels}
        if not changes:
            options["normalise"] = (self._scale.tolist(), self._shift.tolist())  # host tensors: no synchronisation
            options["dtype"] = torch.float32
        if self._cold:
            self._cold = False
            sides, kind = longest_sides(self.image_size, config.crop_ratio), batch.pixels.dtype
            warm_up(self.image_size, sides, pixel_dtype=kind, **options, device=self.device)
        images = crop_resize(batch.pixels, batch.sizes, self.image_size, flip=flip, **options)
        if not changes:
            return images
        images = images.float()
        images = self._photometric(images.mul_(1.0 / self._white), draws).mul_(self._white)
        scale, shift = (to_device(values, self.device)[:, None, None] for values in (self._scale, self._shift))
        return images.mul_(scale).add_(shift)

    def _photometric(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Returns images, whose white is 1, after jitter, grayscale, blur and solarize; may change `images`."""
        config = self.config
        if config.color_jitter:
            self._jitter(images, draws)
        if config.grayscale:
            rows = np.flatnonzero(draws[:, _GRAY] < config.grayscale)
            self._apply(images, rows, lambda part, _: color.grayscale(part).expand_as(part))
        if self._blur is not None:
            rows = np.flatnonzero(draws[:, _BLUR] < config.blur)
            sigmas = _SIGMAS[0] + (_SIGMAS[1] - _SIGMAS[0]) * draws[:, _SIGMA]
            self._apply(images, rows, self._blur, sigmas)
        if config.solarize:
            rows = np.flatnonzero(draws[:, _SOLARIZE] < config.solarize)
            self._apply(images, rows, lambda part, _: color.solarize(part))
        return images

    def _jitter(self, images: Tensor, draws: np.ndarray) -> None:
        """Runs the four colour operations on the images chosen for jitter, each image in its own order."""
        jittered = draws[:, _JITTER] < self.config.color_jitter_probability
        spread = _STRENGTHS * self.config.color_jitter
        factors = (2.0 * draws[:, _FACTORS] - 1.0) * spread + np.array([1.0, 1.0, 1.0, 0.0])
        order = np.argsort(draws[:, _ORDER], axis=1, kind="stable")  # (B, 4): the operation at each turn
        for turn in range(len(_OPERATIONS)):
            for number, operation in enumerate(_OPERATIONS):
                rows = np.flatnonzero(jittered & (order[:, turn] == number))
                self._apply(images, rows, operation, factors[:, number])

    def _apply(
        self, images: Tensor, rows: np.ndarray, operation: Callable[..., Tensor], values: np.ndarray | None = None
    ) -> None:
        """Replaces images[rows] by operation(images[rows], values[rows]), in place."""
        chosen = None
        if values is not None:
            chosen = to_device(torch.from_numpy(values[rows].astype(np.float32)), self.device)[:, None, None, None]
        change_rows(images, rows, operation, chosen)


def change_rows(images: Tensor, rows: np.ndarray, operation: Callable[..., Tensor], *arguments: Any) -> None:
    """Replaces images[rows] by operation(images[rows], *arguments), in place; `rows` int64 are on the host."""
    if len(rows):
        index = to_device(torch.from_numpy(rows), images.device)
        images.index_copy_(0, index, operation(images.index_select(0, index), *arguments))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`; copies through pinned memory on CUDA, to avoid a synchronisation."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

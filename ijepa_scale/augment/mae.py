"""The finetuning augmentation: turns a batch of labelled crops into mixed, normalised images and soft labels.

What happens to a sample depends on (seed, epoch, sample id). How a pair is mixed depends on (seed, step, position in
the global batch). Neither depends on the micro-batch, the process or the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_kernels.crop_resize import crop_resize, warm_up
from ijepa_scale import rng
from ijepa_scale.augment import levels
from ijepa_scale.augment.erasing import RandomErasing
from ijepa_scale.augment.mixing import Mixing
from ijepa_scale.augment.pipeline import change_rows, to_device
from ijepa_scale.augment.rand_augment import RandAugment
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.config.rand_augment_notation import parse
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import longest_sides

_JITTER = (levels.brightness, levels.contrast, levels.color)


class FinetuneAugment:
    """Applies resize, flip, RandAugment, colour jitter, normalisation, random erasing, and mixup or CutMix.

    Operations that are switched off cost nothing.

    Source: arXiv 2111.06377, appendix A.1, in the order of its released code.
    """

    def __init__(
        self,
        config: FinetuneAugmentConfig,
        image_size: tuple[int, int],
        *,
        num_classes: int,
        seed: int,
        pixels: PixelFormat = RGB8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.image_size, self.seed = config, image_size, seed
        self.device = torch.device(device)
        self._cold = True  # the resizing kernels aren't compiled yet
        self._mixing = Mixing(config, num_classes=num_classes, seed=seed)
        self._erase = RandomErasing(config.random_erasing, seed=seed) if config.random_erasing else None
        self._rand_augment = None
        if config.rand_augment is not None:
            red, green, blue = (min(255, round(255 * value)) for value in config.normalisation[0])
            self._rand_augment = RandAugment(
                parse(config.rand_augment), seed=seed, fill=(red, green, blue), interpolation=config.interpolation
            )
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in config.normalisation)
        self._scale, self._shift = (1.0 / (pixels.white * std)).float(), (-mean / std).float()  # (C,) on the host

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (B, C, h, w) float32 images and (B, classes) float32 soft labels; doesn't synchronise.

        Raises:
            ConfigError: the micro-batch has an odd size while mixup or cutmix is on.
        """
        batch = batch.to(self.device)
        config = self.config
        flip = rng.uniform(self.seed, "finetune.flip", batch.epoch, batch.sample_ids, 1)[:, 0] < config.flip
        changes = self._rand_augment is not None or config.color_jitter
        options: dict[str, Any] = {"interpolation": config.interpolation, "channels": batch.channels}
        if not changes:
            options |= {"normalise": (self._scale.tolist(), self._shift.tolist()), "dtype": torch.float32}
        if self._cold:
            self._cold = False
            sides, kind = longest_sides(self.image_size, config.crop_ratio), batch.pixels.dtype
            warm_up(self.image_size, sides, pixel_dtype=kind, **options, device=self.device)
        pixels = crop_resize(batch.pixels, batch.sizes, self.image_size, flip=flip if config.flip else None, **options)
        images = pixels
        if changes:
            if self._rand_augment is not None:
                pixels = self._rand_augment(pixels, epoch=batch.epoch, sample_ids=batch.sample_ids)
            if config.color_jitter:
                self._jitter(pixels, batch)
            scale, shift = (to_device(values, self.device)[:, None, None] for values in (self._scale, self._shift))
            images = pixels.float().mul_(scale).add_(shift)
        if self._erase is not None:
            images = self._erase(images, epoch=batch.epoch, sample_ids=batch.sample_ids)
        return self._mixing(images, batch.labels, step=batch.step, position=batch.position)

    def _jitter(self, pixels: Tensor, batch: Batch) -> None:
        """Changes brightness, contrast and saturation of (B, 3, h, w) uint8 images in place.

        Each image has its own order of operations. Factors are uniform in [max(0, 1 - s), 1 + s], as in torchvision's
        ColorJitter; the operations are PIL's.
        """
        draws = rng.uniform(self.seed, "finetune.jitter", batch.epoch, batch.sample_ids, 2 * len(_JITTER))
        low, high = max(0.0, 1.0 - self.config.color_jitter), 1.0 + self.config.color_jitter
        factors = (low + (high - low) * draws[:, : len(_JITTER)]).astype(np.float32)
        order = np.argsort(draws[:, len(_JITTER) :], axis=1, kind="stable")  # (B, 3): the operation at each turn
        for turn in range(len(_JITTER)):
            for number, enhance in enumerate(_JITTER):
                rows = np.flatnonzero(order[:, turn] == number)
                change_rows(pixels, rows, enhance, to_device(torch.from_numpy(factors[rows, number]), pixels.device))

"""Draws the first batch, so that wrong crops or masks are noticed before a long run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ijepa_scale.config.data import CropConfig
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.batch import Batch
from ijepa_scale.metrics.plots import draw_masks, mask_grids
from ijepa_scale.train.setup import pixels_of

if TYPE_CHECKING:
    from ijepa_scale.train.pretrain import PretrainTask

_NUM_IMAGES = 6


def viewable(images: Tensor, augment: CropConfig, pixels: PixelFormat) -> Tensor:
    """Returns normalised images (B, C, h, w) as RGB in [0, 1].

    Of other formats than 8-bit RGB it takes the first three channels, or the only one as grey, and shows two standard
    deviations around the mean: 16-bit images are often dark, and floats have no white.
    """
    if pixels.is_rgb8:
        mean, std = (images.new_tensor(values)[:, None, None] for values in augment.normalisation)
        return (images.float() * std + mean).clamp(0, 1)
    shown = images[:, :3] if pixels.channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (shown.float() / 4 + 0.5).clamp(0, 1)


def with_masks(task: PretrainTask, batch: Batch) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Returns augmented images (B, 3, h, w) in [0, 1] on the host, with the grids of `mask_grids`. Synchronises."""
    images = viewable(task.augment(batch.to(task.world.device)).cpu(), task.config.augment, pixels_of(task.config))
    masks = task.masks(batch.step, batch.position, len(batch), task.batch_size)
    return images, *mask_grids(masks, len(batch), task.config.model.grid)


def draw_first_batch(task: PretrainTask, batch: Batch, path: Path) -> None:
    """Draws a few augmented images with their context and target blocks. Synchronises. Called once per run."""
    micro = next(batch.split(task.config.engine.accumulation))
    images, context, targets = with_masks(task, micro)
    draw_masks(images[:_NUM_IMAGES], context[:_NUM_IMAGES], targets[:_NUM_IMAGES], path)

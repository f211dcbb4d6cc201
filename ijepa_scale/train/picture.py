"""Draws the first batch, so that wrong crops or masks are noticed before a long run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.metrics.plots import draw_masks, mask_grids

if TYPE_CHECKING:
    from ijepa_scale.train.pretrain import PretrainTask

_NUM_IMAGES = 6


def draw_first_batch(task: PretrainTask, batch: Batch, path: Path) -> None:
    """Draws a few augmented images with their context and target blocks. Synchronises. Called once per run."""
    micro = next(batch.split(task.config.engine.accumulation))
    count = min(_NUM_IMAGES, len(micro))
    mean, std = (torch.tensor(v)[:, None, None] for v in (task.config.augment.mean, task.config.augment.std))
    images = task.augment(micro)[:count].cpu() * std + mean
    masks = task.masks(micro.step, micro.position, len(micro), task.batch_size)
    context, targets = mask_grids(masks, len(micro), task.config.model.grid)
    draw_masks(images.clamp(0, 1), context[:count], targets[:count], path)

"""A picture of the first batch, so that a wrong crop or mask is seen before hours are spent."""

from __future__ import annotations

from pathlib import Path

import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.metrics.plots import draw_masks, mask_grids
from ijepa_scale.train.setup import Run

_NUM_IMAGES = 6


def draw_first_batch(run: Run, batch: Batch, path: Path) -> None:
    """Draws a few augmented images with their context and target blocks. Synchronises: once per run."""
    micro = next(batch.split(run.config.engine.accumulation))
    count = min(_NUM_IMAGES, len(micro))
    mean, std = (torch.tensor(v)[:, None, None] for v in (run.config.augment.mean, run.config.augment.std))
    images = run.augment(micro)[:count].cpu() * std + mean
    masks = run.masks(micro.step, micro.position, len(micro), run.batch_size)
    context, targets = mask_grids(masks, len(micro), run.config.model.grid)
    draw_masks(images.clamp(0, 1), context[:count], targets[:count], path)

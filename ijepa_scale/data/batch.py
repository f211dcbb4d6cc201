"""What the data path hands to the training step. Floor 2: tensors, no process and no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One process's consecutive part of a global batch.

    The crop of each image has been chosen and cut out on the host, from its own keyed draw; resizing
    and everything after it runs on the device. Host arrays key those later draws.
    """

    canvas: Tensor  # (B, 3, Hc, Wc) uint8: each crop at the top left, the rest undefined; channels last in memory
    sizes: np.ndarray  # (B, 2) int64, host: height and width of each crop, pixels
    sample_ids: np.ndarray  # (B,) int64, host: the sample's number in the whole set
    labels: Tensor  # (B,) int64; -1 where there is none
    step: int  # optimiser step this batch belongs to
    epoch: int
    position: int  # place of the first image in the global batch

    def __len__(self) -> int:
        return len(self.sample_ids)

    def split(self, parts: int) -> Iterator[Batch]:
        """Yields `parts` consecutive micro-batches of equal size."""
        size, rest = divmod(len(self), parts)
        if rest:
            raise ValueError(f"{len(self)} images don't split into {parts} micro-batches; choose a divisor")
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            yield Batch(
                canvas=self.canvas[rows],
                sizes=self.sizes[rows],
                sample_ids=self.sample_ids[rows],
                labels=self.labels[rows],
                step=self.step,
                epoch=self.epoch,
                position=self.position + part * size,
            )

    def pin_memory(self) -> Batch:
        """Returns the batch with its tensors in page-locked memory."""
        return self._with(self.canvas.pin_memory(), self.labels.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device` (asynchronous from pinned memory)."""
        return self._with(self.canvas.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))

    def _with(self, canvas: Tensor, labels: Tensor) -> Batch:
        return Batch(
            canvas=canvas, sizes=self.sizes, sample_ids=self.sample_ids, labels=labels,
            step=self.step, epoch=self.epoch, position=self.position,
        )  # fmt: skip

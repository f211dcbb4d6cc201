"""What the data path hands to the training step. Tensors, no process and no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One process's consecutive part of a global batch.

    The crop of each image has been chosen and cut out on the host, from its own keyed draw; resizing
    and everything after it runs on the device. Host arrays key those later draws. Crops lie one behind
    the other without gaps: what is copied to the device is what was cut out, and nothing more.
    """

    pixels: Tensor  # (bytes,) uint8: crop after crop, each (height, width, 3) RGB, row by row
    sizes: np.ndarray  # (B, 2) int64, host: height and width of each crop, pixels
    sample_ids: np.ndarray  # (B,) int64, host: the sample's number in the whole set
    labels: Tensor  # (B,) int64; -1 where there is none
    step: int  # optimiser step this batch belongs to
    epoch: int
    position: int  # place of the first image in the global batch

    def __len__(self) -> int:
        return len(self.sample_ids)

    def crop(self, row: int) -> Tensor:
        """Returns the crop of image `row`, (h, w, 3) uint8, a view."""
        height, width = self.sizes[row].tolist()
        begin = int(self._ends()[row])
        return self.pixels[begin : begin + height * width * 3].view(height, width, 3)

    def split(self, parts: int) -> Iterator[Batch]:
        """Yields `parts` consecutive micro-batches of equal size."""
        size, rest = divmod(len(self), parts)
        if rest:
            raise ValueError(f"{len(self)} images don't split into {parts} micro-batches; choose a divisor")
        ends = self._ends()
        for begin in range(0, len(self), max(1, size)):
            rows = slice(begin, begin + size)
            yield dataclasses.replace(
                self,
                pixels=self.pixels[int(ends[begin]) : int(ends[begin + size])],
                sizes=self.sizes[rows],
                sample_ids=self.sample_ids[rows],
                labels=self.labels[rows],
                position=self.position + begin,
            )

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device` (asynchronous from page-locked memory)."""
        pixels, labels = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.labels))
        return dataclasses.replace(self, pixels=pixels, labels=labels)

    def clone(self) -> Batch:
        """Returns a copy that stays as it is when the loader goes on to the next batch."""
        return dataclasses.replace(self, pixels=self.pixels.clone(), labels=self.labels.clone())

    def _ends(self) -> np.ndarray:
        """Returns (B + 1,): where each crop begins in `pixels`, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(3 * self.sizes[:, 0] * self.sizes[:, 1])])

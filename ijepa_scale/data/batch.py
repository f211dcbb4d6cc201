"""The batch that the data path hands to the training step. Knows nothing of processes or models."""

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

    The crop of each image was chosen by a keyed draw and cut out on the host; resizing and everything after it
    runs on the device. The host arrays are the keys of the later draws. Crops are stored one after the other
    without gaps, so only the pixels that were cut out are copied to the device.
    """

    pixels: Tensor  # (values,) uint8, uint16 or float32: crop after crop, each (height, width, C), row by row
    sizes: np.ndarray  # (B, 2) int64, host: height and width of each crop, pixels
    sample_ids: np.ndarray  # (B,) int64, host: the sample's number in the whole set
    labels: Tensor  # (B,) int64; -1 if there is none
    step: int  # optimiser step this batch belongs to
    epoch: int
    position: int  # position of the first image in the global batch
    channels: int = 3  # C

    def __len__(self) -> int:
        return len(self.sample_ids)

    def crop(self, row: int) -> Tensor:
        """Returns a view of the crop of image `row`, (h, w, C)."""
        height, width = self.sizes[row].tolist()
        begin = int(self._ends()[row])
        return self.pixels[begin : begin + height * width * self.channels].view(height, width, self.channels)

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
        """Returns the batch with its tensors on `device`; the copy is asynchronous from page-locked memory."""
        pixels, labels = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.labels))
        return dataclasses.replace(self, pixels=pixels, labels=labels)

    def clone(self) -> Batch:
        """Returns a copy that stays valid when the loader continues with the next batch."""
        return dataclasses.replace(self, pixels=self.pixels.clone(), labels=self.labels.clone())

    def _ends(self) -> np.ndarray:
        """Returns the offset of each crop in `pixels` and the end of the last one, (B + 1,)."""
        return np.concatenate([[0], np.cumsum(self.channels * self.sizes[:, 0] * self.sizes[:, 1])])

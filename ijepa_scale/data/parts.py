"""Reads, decodes and crops one process's part of a global batch into a buffer. Knows nothing of other processes.

An indexed source yields the samples that `SampleOrder` names; a stream yields whatever comes next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import get_worker_info

from ijepa_scale import rng
from ijepa_scale.config.data import AugmentConfig
from ijepa_scale.data.decode import CROP_DRAWS, decode_crop
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamOrder, StreamSample, StreamSource
from ijepa_scale.errors import DataError, SampleError

_REPLACEMENTS = 8  # samples tried as a replacement of a bad one
_BAD_PER_BATCH = 8  # in units of the batch: a stream with more bad samples while filling one batch ends the run


@dataclass(frozen=True)
class BadSample:
    """A sample that couldn't be read or decoded, and why."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class Item:
    """A worker's result: what it wrote into a slot and the bad samples it met, or the error that ends the run."""

    slot: int
    step: int = 0
    sizes: np.ndarray | None = None  # as in Batch
    sample_ids: np.ndarray | None = None
    labels: np.ndarray | None = None
    bad: tuple[BadSample, ...] = ()
    error: str | None = None


class Parts(Protocol):
    """Fills buffers with this process's parts of global batches."""

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step."""

    def fill(self, step: int, slot: int, pixels: np.ndarray) -> Item:
        """Writes the crops of one batch into `pixels` (bytes,) uint8, without gaps; returns what it wrote."""


class IndexedParts:
    """Reads, decodes and crops this process's part of a global batch: the samples that `order` names."""

    def __init__(
        self,
        source: SampleSource,
        order: SampleOrder,
        augment: AugmentConfig,
        image_size: tuple[int, int],
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.source, self.order, self.augment, self.image_size = source, order, augment, image_size
        self.seed, self.rank, self.world = seed, rank, world
        self._prepared: tuple[int, int] | None = None

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step."""
        return self.order.epoch(step)

    def fill(self, step: int, slot: int, pixels: np.ndarray) -> Item:
        """Writes one batch into `pixels`; see `Parts`. Replaces each bad sample by another one of the set."""
        self._prepare(step)
        epoch = self.order.epoch(step)
        ids = self.order.part(step, self.rank, self.world)
        draws = _draws(self.seed, epoch, ids)
        sizes = np.empty((len(ids), 2), dtype=np.int64)
        bad = []
        end = 0
        for row, sample in enumerate(ids.tolist()):
            try:
                crop = _crop(self.source.read(sample), draws[row], self.augment, self.image_size)
            except SampleError as error:
                bad.append(BadSample(error.kind, self.source.name(sample), str(error)))
                ids[row], crop = self._replacement(epoch, sample)
            end = _put(crop, pixels, end)
            sizes[row] = crop.shape[:2]
        labels = np.array([self.source.label(sample) for sample in ids.tolist()], dtype=np.int64)
        return Item(slot, step, sizes, ids, labels, tuple(bad))

    def _prepare(self, step: int) -> None:
        """At the start of a window, tells the source which shards this window and the next one read."""
        window = self.order.window(step)
        if window != self._prepared:
            epoch, number = window
            self.source.prepare(self.order.shards(epoch, number), self.order.shards(epoch, number + 1))
            self._prepared = window

    def _replacement(self, epoch: int, bad_id: int) -> tuple[int, np.ndarray]:
        """Returns (sample id, crop) of the first decodable one among the replacements drawn for a bad sample."""
        draws = rng.uniform(self.seed, "replace", epoch, np.array([bad_id]), _REPLACEMENTS)[0]
        for sample in (draws * self.source.num_samples).astype(np.int64):
            drawn = _draws(self.seed, epoch, sample[None])[0]
            try:
                return int(sample), _crop(self.source.read(int(sample)), drawn, self.augment, self.image_size)
            except SampleError:
                continue  # counted as bad when the order reaches it
        raise DataError(
            f"sample {self.source.name(bad_id)} and {_REPLACEMENTS} replacements drawn for it couldn't be decoded; "
            "check that the data holds images"
        )


class StreamParts:
    """Decodes and crops the next samples of this worker's stream, and skips bad ones."""

    def __init__(
        self,
        source: StreamSource,
        order: StreamOrder,
        augment: AugmentConfig,
        image_size: tuple[int, int],
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.source, self.order, self.augment, self.image_size = source, order, augment, image_size
        self.seed, self.rank, self.world = seed, rank, world
        self._samples: Iterator[StreamSample] | None = None

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step."""
        return self.order.epoch(step)

    def fill(self, step: int, slot: int, pixels: np.ndarray) -> Item:
        """Writes one batch into `pixels`; see `Parts`. The stream starts at the first step that is asked for."""
        if self._samples is None:
            worker = get_worker_info()
            number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
            part = self.rank * count + number
            self._samples = self.source.stream(self.seed, step - number, part, self.world * count)
        epoch, size = self.order.epoch(step), self.order.part_size(self.world)
        sizes = np.empty((size, 2), dtype=np.int64)
        ids, labels = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        bad: list[BadSample] = []
        row = end = 0
        while row < size:
            sample = next(self._samples)
            kind, reason = sample.kind, sample.reason
            if kind is None:
                try:
                    drawn = _draws(self.seed, epoch, np.array([sample.sample_id]))[0]
                    crop = _crop(sample.data, drawn, self.augment, self.image_size)
                except SampleError as error:
                    kind, reason = error.kind, str(error)
            if kind is not None:
                bad.append(BadSample(kind, sample.name, reason))
                if len(bad) > _BAD_PER_BATCH * size:
                    raise DataError(
                        f"met {len(bad)} bad samples before {size} good ones, the last {sample.name} ({reason}); "
                        "check that the shards hold images"
                    )
                continue
            end = _put(crop, pixels, end)
            sizes[row], ids[row], labels[row] = crop.shape[:2], sample.sample_id, sample.label
            row += 1
        return Item(slot, step, sizes, ids, labels, tuple(bad))


def _draws(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    return rng.uniform(seed, "crop", epoch, ids, CROP_DRAWS)


def _crop(
    data: bytes | np.ndarray, draws: np.ndarray, augment: AugmentConfig, image_size: tuple[int, int]
) -> np.ndarray:
    return decode_crop(data, draws.tolist(), image_size, scale=augment.crop_scale, ratio=augment.crop_ratio)


def _put(crop: np.ndarray, pixels: np.ndarray, begin: int) -> int:
    """Writes the crop into `pixels` at offset `begin` and returns the offset at which it ends."""
    end = begin + crop.size
    pixels[begin:end].reshape(crop.shape)[:] = crop
    return end


__all__ = ["BadSample", "IndexedParts", "Item", "Parts", "StreamParts"]

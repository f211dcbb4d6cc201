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
from ijepa_scale.config.form import Interpolation
from ijepa_scale.data.decode import CROP_DRAWS, PixelRules, choose_box, decode_crop
from ijepa_scale.data.deep_decode import crop_deep, decode_deep
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
    shard: str | None = None  # whose samples are all bad, for the same reason


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


class CropAugment(Protocol):
    """The settings of an augmentation that choose and resize crops."""

    @property
    def crop_scale(self) -> tuple[float, float]: ...  # noqa: D102
    @property
    def crop_ratio(self) -> tuple[float, float]: ...  # noqa: D102
    @property
    def interpolation(self) -> Interpolation: ...  # noqa: D102


class Parts(Protocol):
    """Fills buffers with this process's parts of global batches."""

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step."""

    def fill(self, step: int, slot: int, pixels: np.ndarray) -> Item:
        """Writes the crops of one batch into `pixels` (values,), without gaps; returns what it wrote."""


@dataclass(frozen=True)
class Crops:
    """Decodes images and cuts out the crops that are drawn by (seed, epoch, sample id)."""

    augment: CropAugment
    image_size: tuple[int, int]  # height and width that the crops are resized to, pixels
    seed: int
    rules: PixelRules

    def draws(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """Returns the draws of these samples (B,), (B, CROP_DRAWS) float64 in [0, 1)."""
        return rng.uniform(self.seed, "crop", epoch, ids, CROP_DRAWS)

    def cut(self, data: bytes | np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns the crop that `draws` (CROP_DRAWS,) choose, (h, w, C) in the format of the rules.

        Raises:
            SampleError: the image can't be decoded.
        """
        augment, rules = self.augment, self.rules
        if not rules.pixels.is_rgb8:
            pixels = decode_deep(data, rules.pixels, rules.exif)
            height, width = pixels.shape[:2]
            box = choose_box(height, width, draws.tolist(), augment.crop_scale, augment.crop_ratio)
            return crop_deep(pixels, box, self.image_size, augment.interpolation)
        return decode_crop(
            data,
            draws.tolist(),
            self.image_size,
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            interpolation=augment.interpolation,
            rules=rules,
        )


class IndexedParts:
    """Reads, decodes and crops this process's part of a global batch: the samples that `order` names."""

    def __init__(self, source: SampleSource, order: SampleOrder, crops: Crops, rank: int, world: int) -> None:
        self.source, self.order, self.crops, self.rank, self.world = source, order, crops, rank, world
        self._prepared: tuple[int, int] | None = None

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step."""
        return self.order.epoch(step)

    def fill(self, step: int, slot: int, pixels: np.ndarray) -> Item:
        """Writes one batch into `pixels`; see `Parts`. Replaces each bad sample by another one of the set."""
        self._prepare(step)
        epoch = self.order.epoch(step)
        ids = self.order.part(step, self.rank, self.world)
        draws = self.crops.draws(epoch, ids)
        sizes = np.empty((len(ids), 2), dtype=np.int64)
        bad = []
        end = 0
        for row, sample in enumerate(ids.tolist()):
            try:
                crop = self.crops.cut(self.source.read(sample), draws[row])
            except SampleError as error:
                bad.append(BadSample(error.kind, self.source.name(sample), str(error), getattr(error, "shard", None)))
                ids[row], crop = self._replacement(epoch, sample, error)
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

    def _replacement(self, epoch: int, bad_id: int, why: SampleError) -> tuple[int, np.ndarray]:
        """Returns (sample id, crop) of the first decodable one among the replacements drawn for a bad sample."""
        reason = ""
        draws = rng.uniform(self.crops.seed, "replace", epoch, np.array([bad_id]), _REPLACEMENTS)[0]
        for sample in (draws * self.source.num_samples).astype(np.int64):
            drawn = self.crops.draws(epoch, sample[None])[0]
            try:
                return int(sample), self.crops.cut(self.source.read(int(sample)), drawn)
            except SampleError as error:
                reason = str(error)  # counted as bad when the order reaches it
        raise DataError(
            f"sample {self.source.name(bad_id)} ({why}) and {_REPLACEMENTS} replacements drawn for it couldn't be "
            f"decoded; check that the data holds images (the last one: {reason})"
        )


class StreamParts:
    """Decodes and crops the next samples of this worker's stream, and skips bad ones."""

    def __init__(self, source: StreamSource, order: StreamOrder, crops: Crops, rank: int, world: int) -> None:
        self.source, self.order, self.crops, self.rank, self.world = source, order, crops, rank, world
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
            self._samples = self.source.stream(self.crops.seed, step - number, part, self.world * count)
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
                    drawn = self.crops.draws(epoch, np.array([sample.sample_id]))[0]
                    crop = self.crops.cut(sample.data, drawn)
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


def _put(crop: np.ndarray, pixels: np.ndarray, begin: int) -> int:
    """Writes the crop into `pixels` at offset `begin` and returns the offset at which it ends."""
    end = begin + crop.size
    pixels[begin:end].reshape(crop.shape)[:] = crop
    return end


__all__ = ["BadSample", "CropAugment", "Crops", "IndexedParts", "Item", "Parts", "StreamParts"]

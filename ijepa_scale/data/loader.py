"""Batches for training, decoded in worker processes. Floor 2: no model, no peers.

What is in a batch depends on (seed, step) and on which part of it this process takes; the number of workers
and the step at which reading starts change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from ijepa_scale import rng
from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import CROP_DRAWS, decode_crop
from ijepa_scale.data.evaluation import EvalBatch, EvalReader, spread
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.source import SampleSource
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

_REPLACEMENTS = 8  # other samples tried in the place of a bad one
_SEEN_BEFORE_STOP = 1000  # samples over which the bad share is judged first
_WHOLE_BATCH = 8  # images: a batch of at least so many that is bad throughout ends the run at once


@dataclass(frozen=True)
class BadSample:
    """A sample that couldn't be decoded, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Item:
    """What a worker hands over: a batch and its bad samples, or the error that ends the run."""

    batch: Batch | None
    bad: tuple[BadSample, ...] = ()
    error: str | None = None

    def pin_memory(self) -> _Item:
        return self if self.batch is None else _Item(self.batch.pin_memory(), self.bad)


class TrainLoader:
    """This process's parts of the global batches start_step .. stop_step - 1, in order.

    Bad samples are replaced by others of the set, drawn by (seed, epoch, sample), logged by name and counted in
    `num_bad`; more than `max_bad_fraction` of the samples seen (after the first 1000), or all of a batch, end it.
    Iterating again starts again at `start_step`.
    """

    def __init__(
        self,
        source: SampleSource,
        order: SampleOrder,
        augment: AugmentConfig,
        image_size: tuple[int, int],
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        start_step: int = 0,
        stop_step: int,
        max_bad_fraction: float = 0.001,
        pin_memory: bool = False,
    ) -> None:
        if order.num_samples != source.num_samples:
            raise DataError(
                f"the order counts {order.num_samples} samples, the source {source.num_samples}; "
                "build the order from source.shard_sizes"
            )
        self.num_seen = 0
        self.num_bad = 0
        self._max_bad_fraction = max_bad_fraction
        self._images_per_step = order.part_size(world)
        parts = _Parts(source, order, augment, image_size, seed, rank, world)
        steps = range(start_step, max(start_step, stop_step))
        self._batches = ordered_loader(parts, steps, workers=workers, prefetch=prefetch, pin_memory=pin_memory)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self.num_seen = self.num_bad = 0
        for item in self._batches:
            if item.error is not None:
                raise DataError(item.error)
            for bad in item.bad:
                logger.warning("sample %s is replaced: %s", bad.name, bad.reason)
            self._count(item)
            yield item.batch

    def _count(self, item: _Item) -> None:
        """Adds up bad samples, and stops when there are too many."""
        self.num_seen += self._images_per_step
        self.num_bad += len(item.bad)
        fraction = self.num_bad / self.num_seen
        judged = self.num_seen >= _SEEN_BEFORE_STOP or self._max_bad_fraction == 0
        whole = len(item.bad) == self._images_per_step >= _WHOLE_BATCH
        if item.bad and (whole or (judged and fraction > self._max_bad_fraction)):
            last = item.bad[-1]
            raise DataError(
                f"{self.num_bad} of {self.num_seen} samples couldn't be decoded, over data.max_bad_fraction "
                f"{self._max_bad_fraction:g}; the last is {last.name} ({last.reason}); mend the data or raise the limit"
            )


class _Parts(Dataset):
    """Item t is this process's part of global batch t."""

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

    def __getitem__(self, step: int) -> _Item:
        try:
            return self._part(step)
        except DataError as error:  # told to the main process as one line, not as a worker's traceback
            return _Item(None, error=str(error))

    def _part(self, step: int) -> _Item:
        epoch = self.order.epoch(step)
        ids = self.order.part(step, self.rank, self.world)
        draws = self._draws(epoch, ids)
        crops, bad = [], []
        for row in range(len(ids)):
            data = self.source.read(int(ids[row]))
            try:
                crops.append(self._crop(data, draws[row]))
            except DataError as error:
                bad.append(BadSample(self.source.name(int(ids[row])), str(error)))
                ids[row], crop = self._replacement(epoch, int(ids[row]))
                crops.append(crop)
        canvas, sizes = _canvas(crops)
        labels = torch.tensor([self.source.label(int(sample)) for sample in ids], dtype=torch.int64)
        position = self.rank * len(ids)
        batch = Batch(
            canvas=canvas, sizes=sizes, sample_ids=ids, labels=labels, step=step, epoch=epoch, position=position
        )
        return _Item(batch, tuple(bad))

    def _draws(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        return rng.uniform(self.seed, "crop", epoch, ids, CROP_DRAWS)

    def _crop(self, data: bytes | np.ndarray, draws: np.ndarray) -> np.ndarray:
        config = self.augment
        return decode_crop(data, draws.tolist(), self.image_size, scale=config.crop_scale, ratio=config.crop_ratio)

    def _replacement(self, epoch: int, bad_id: int) -> tuple[int, np.ndarray]:
        """Returns (sample id, crop) of the first decodable sample among some drawn for this bad one."""
        draws = rng.uniform(self.seed, "replace", epoch, np.array([bad_id]), _REPLACEMENTS)[0]
        for sample in (draws * self.source.num_samples).astype(np.int64):
            data = self.source.read(int(sample))
            try:
                return int(sample), self._crop(data, self._draws(epoch, sample[None])[0])
            except DataError:
                continue  # counted when its own turn comes
        raise DataError(
            f"sample {self.source.name(bad_id)} and {_REPLACEMENTS} others drawn in its place couldn't be decoded; "
            "check that the shards hold images"
        )


def _canvas(crops: list[np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
    """Returns the crops at the top left of one zeroed channels-last (B, 3, Hc, Wc) tensor, and their sizes."""
    sizes = np.array([crop.shape[:2] for crop in crops], dtype=np.int64)
    shape = (len(crops), int(sizes[:, 0].max()), int(sizes[:, 1].max()), 3)
    if get_worker_info() is None:
        pixels = torch.zeros(shape, dtype=torch.uint8)
    else:  # in shared memory (zeroed by the system) from the start, which saves a copy
        storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
        pixels = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
    rows = pixels.numpy()
    for row, crop in zip(rows, crops, strict=True):
        row[: crop.shape[0], : crop.shape[1]] = crop
    return pixels.permute(0, 3, 1, 2), sizes


__all__ = ["BadSample", "EvalBatch", "EvalReader", "TrainLoader", "spread"]

"""Batches for training, decoded in worker processes. Floor 2: no model, no peers.

What is in a batch depends on (seed, step) and on which part of it this process takes; the number of workers
and the step at which reading starts change nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ijepa_scale import rng
from ijepa_scale.config.data import AugmentConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import CROP_DRAWS, decode_crop, largest_crop
from ijepa_scale.data.evaluation import EvalBatch, EvalReader, spread
from ijepa_scale.data.feed import DeviceFeed
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.slots import Slots
from ijepa_scale.data.source import SampleSource
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError, SampleError

logger = logging.getLogger(__name__)

_REPLACEMENTS = 8  # other samples tried in the place of a bad one
_SEEN_BEFORE_STOP = 1000  # samples over which the bad share is judged first
_WHOLE_BATCH = 8  # images: a batch of at least so many that is bad throughout ends the run at once


@dataclass(frozen=True)
class BadSample:
    """A sample that couldn't be decoded, and why."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class _Item:
    """What a worker hands over: what is in a slot and its bad samples, or the error that ends the run."""

    slot: int
    step: int = 0
    sizes: np.ndarray | None = None  # as in Batch
    sample_ids: np.ndarray | None = None
    labels: np.ndarray | None = None
    bad: tuple[BadSample, ...] = ()
    error: str | None = None


class TrainLoader:
    """This process's parts of the global batches start_step .. stop_step - 1, in order.

    **A batch is valid until the next one is asked for**: its pixels lie in a buffer that is used again
    (`Batch.clone` keeps it). On a CUDA `device` batches arrive there, copied on a stream of their own while
    the batch before is computed with.

    Bad samples are replaced by others of the set, drawn by (seed, epoch, sample), logged by name and counted by
    kind in `bad`; more than `max_bad_fraction` of the samples seen (after the first 1000), or all of a batch, end
    it. Iterating again starts again at `start_step`.
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
        device: torch.device | str = "cpu",
    ) -> None:
        if order.num_samples != source.num_samples:
            raise DataError(
                f"the order counts {order.num_samples} samples, the source {source.num_samples}; "
                "build the order from source.shard_sizes"
            )
        self.num_seen = 0
        self.bad: Counter[str] = Counter()
        self._max_bad_fraction = max_bad_fraction
        self._images_per_step = order.part_size(world)
        self._parts = _Parts(source, order, augment, image_size, seed, rank, world)
        self._slot_bytes = 3 * largest_crop(image_size, augment.crop_ratio) * self._images_per_step
        self._steps = range(start_step, max(start_step, stop_step))
        self._workers, self._prefetch = workers, prefetch
        self._device = torch.device(device)

    @property
    def num_bad(self) -> int:
        """Samples replaced so far."""
        return self.bad.total()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        self.num_seen, self.bad = 0, Counter()
        # one with the caller, two on their way to the device, and what workers fill or have filled
        slots = Slots(self._workers * self._prefetch + 3, self._slot_bytes)
        feed = DeviceFeed(slots, self._device)
        batches = ordered_loader(
            _SlotParts(self._parts, slots),
            ((step, feed.take()) for step in self._steps),
            workers=self._workers,
            prefetch=self._prefetch,
        )
        return feed.deliver((item.slot, batch) for item, batch in self._checked(batches, slots))

    def _checked(self, items: Iterable[_Item], slots: Slots) -> Iterator[tuple[_Item, Batch]]:
        """Yields items with their batches, and stops at what ends the run."""
        for item in items:
            if item.error is not None:
                raise DataError(item.error)
            for bad in item.bad:
                logger.warning("sample %s is replaced: %s", bad.name, bad.reason)
            self._count(item)
            assert item.sizes is not None and item.sample_ids is not None and item.labels is not None
            batch = Batch(
                pixels=slots.tensor(item.slot, 3 * int((item.sizes[:, 0] * item.sizes[:, 1]).sum())),
                sizes=item.sizes,
                sample_ids=item.sample_ids,
                labels=torch.from_numpy(item.labels),
                step=item.step,
                epoch=self._parts.order.epoch(item.step),
                position=self._parts.rank * len(item.sample_ids),
            )
            yield item, batch

    def _count(self, item: _Item) -> None:
        """Adds up bad samples, and stops when there are too many."""
        self.num_seen += self._images_per_step
        self.bad.update(bad.kind for bad in item.bad)
        fraction = self.num_bad / self.num_seen
        judged = self.num_seen >= _SEEN_BEFORE_STOP or self._max_bad_fraction == 0
        whole = len(item.bad) == self._images_per_step >= _WHOLE_BATCH
        if item.bad and (whole or (judged and fraction > self._max_bad_fraction)):
            last = item.bad[-1]
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.bad.most_common())
            raise DataError(
                f"{self.num_bad} of {self.num_seen} samples couldn't be decoded ({kinds}), over data.max_bad_fraction "
                f"{self._max_bad_fraction:g}; the last is {last.name} ({last.reason}); mend the data or raise the limit"
            )


class _SlotParts(Dataset):
    """Item (step, slot): this process's part of global batch `step`, its pixels in buffer `slot`."""

    def __init__(self, parts: _Parts, slots: Slots) -> None:
        self._parts, self._slots = parts, slots

    def __getitem__(self, place: tuple[int, int]) -> _Item:
        step, slot = place
        try:
            return self._parts.fill(step, slot, self._slots.array(slot))
        except DataError as error:  # told to the main process as one line, not as a worker's traceback
            return _Item(slot, error=str(error))


class _Parts:
    """Reads, decodes and crops this process's part of a global batch."""

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

    def fill(self, step: int, slot: int, pixels: np.ndarray) -> _Item:
        """Returns what it wrote into `pixels` (bytes,) uint8: the crops of one batch, one behind the other."""
        self._prepare(step)
        epoch = self.order.epoch(step)
        ids = self.order.part(step, self.rank, self.world)
        draws = self._draws(epoch, ids)
        sizes = np.empty((len(ids), 2), dtype=np.int64)
        bad = []
        end = 0
        for row, sample in enumerate(ids.tolist()):
            data = self.source.read(sample)
            try:
                crop = self._crop(data, draws[row])
            except SampleError as error:
                bad.append(BadSample(error.kind, self.source.name(sample), str(error)))
                ids[row], crop = self._replacement(epoch, sample)
            begin, end = end, end + crop.size
            pixels[begin:end].reshape(crop.shape)[:] = crop
            sizes[row] = crop.shape[:2]
        labels = np.array([self.source.label(sample) for sample in ids.tolist()], dtype=np.int64)
        return _Item(slot, step, sizes, ids, labels, tuple(bad))

    def _prepare(self, step: int) -> None:
        """Tells the source, when a window begins, which shards it reads and which ones the next."""
        window = self.order.window(step)
        if window != self._prepared:
            epoch, number = window
            self.source.prepare(self.order.shards(epoch, number), self.order.shards(epoch, number + 1))
            self._prepared = window

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
            except SampleError:
                continue  # counted when its own turn comes
        raise DataError(
            f"sample {self.source.name(bad_id)} and {_REPLACEMENTS} others drawn in its place couldn't be decoded; "
            "check that the shards hold images"
        )


__all__ = ["BadSample", "EvalBatch", "EvalReader", "TrainLoader", "spread"]

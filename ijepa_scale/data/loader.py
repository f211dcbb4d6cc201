"""Batches for training, decoded in worker processes. Knows nothing of models or of other processes.

The content of a batch depends only on (seed, step) and on the part of it that this process takes, not on the number
of workers or on the step at which reading starts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch.utils.data import Dataset

from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import PixelRules, largest_crop
from ijepa_scale.data.eval_reader import EvalBatch, EvalReader, spread
from ijepa_scale.data.feed import DeviceFeed
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.parts import BadSample, CropAugment, Crops, IndexedParts, Item, Parts, StreamParts
from ijepa_scale.data.slots import Slots
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

_TYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
_SEEN_BEFORE_STOP = 1000  # samples seen before the bad fraction is first checked
_NEW_PASSES = "; the stream begins new passes over its shards, so samples may repeat before others have been read"
_WHOLE_BATCH = 8  # images: a batch of at least this many, all of them bad, ends the run at once


class TrainLoader:
    """Iterates over this process's parts of the global batches start_step .. stop_step - 1, in order.

    **A batch is valid until the next one is asked for**, because its buffer is reused; `Batch.clone` returns a copy
    that stays valid. With a CUDA `device`, batches are delivered on the device: each is copied on a separate stream
    during the computation on the previous one.

    Bad samples are replaced by others of the set, drawn by (seed, epoch, sample), logged by name and counted by
    kind in `bad`. Iteration raises `DataError` when more than `max_bad_fraction` of the samples seen are bad (checked
    after the first 1000), or a whole batch is. A run that may be shorter calls `check_bad` at its end. Iterating again
    starts again at `start_step`.
    """

    def __init__(
        self,
        source: SampleSource | StreamSource,
        order: SampleOrder | StreamOrder,
        augment: CropAugment,
        image_size: tuple[int, int],
        *,
        seed: int,
        rules: PixelRules | None = None,
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
        if isinstance(source, StreamSource):
            source.check_parts(world, workers)
        self.num_seen = 0
        self.bad: Counter[str] = Counter()
        self._last_bad: BadSample | None = None
        self._bad_shards: set[str] = set()  # that were named in the log
        self._max_bad_fraction = max_bad_fraction
        self._images_per_step = order.part_size(world)
        self._rank = rank
        rules = rules or PixelRules()
        self._pixels = rules.pixels
        crops = Crops(augment, image_size, seed, rules)
        self._make_parts = _parts_of(source, order, crops, rank=rank, world=world)
        values = self._pixels.channels * largest_crop(image_size, augment.crop_ratio) * self._images_per_step
        self._slot_bytes = values * self._pixels.value_bytes
        self._steps = range(start_step, max(start_step, stop_step))
        self._workers, self._prefetch = workers, prefetch
        self._after_restart = _NEW_PASSES if isinstance(source, StreamSource) else ""
        # one buffer in use by the caller, two being copied to the device, the others filled by workers
        self._num_slots = workers * prefetch + 3
        self._device = torch.device(device)

    @property
    def num_bad(self) -> int:
        """The number of samples replaced so far."""
        return self.bad.total()

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the buffers that batches are decoded into; page-locked if batches are delivered to a GPU."""
        return self._num_slots * self._slot_bytes

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        self.num_seen, self.bad, self._last_bad = 0, Counter(), None
        self._bad_shards.clear()
        slots = Slots(self._num_slots, self._slot_bytes)
        feed = DeviceFeed(slots, self._device)
        parts = self._make_parts()
        batches = ordered_loader(
            _SlotParts(parts, slots, self._pixels.dtype),
            ((step, feed.take()) for step in self._steps),
            workers=self._workers,
            prefetch=self._prefetch,
            after_restart=self._after_restart,
        )
        return feed.deliver((item.slot, batch) for item, batch in self._checked(batches, slots, parts))

    def _checked(self, items: Iterable[Item], slots: Slots, parts: Parts) -> Iterator[tuple[Item, Batch]]:
        """Yields items with their batches; raises the error that a worker reported."""
        channels = self._pixels.channels
        for item in items:
            if item.error is not None:
                raise DataError(item.error)
            for bad in item.bad:
                self._report(bad)
            self._count(item)
            assert item.sizes is not None and item.sample_ids is not None and item.labels is not None
            batch = Batch(
                pixels=slots.tensor(
                    item.slot, channels * int((item.sizes[:, 0] * item.sizes[:, 1]).sum()), _TYPES[self._pixels.dtype]
                ),
                sizes=item.sizes,
                sample_ids=item.sample_ids,
                labels=torch.from_numpy(item.labels),
                step=item.step,
                epoch=parts.epoch(item.step),
                position=self._rank * len(item.sample_ids),
                channels=channels,
            )
            yield item, batch

    def _report(self, bad: BadSample) -> None:
        """Logs a bad sample, and a bad shard once."""
        if bad.shard is None:
            logger.warning("sample %s is replaced: %s", bad.name, bad.reason)
        elif bad.shard not in self._bad_shards:
            self._bad_shards.add(bad.shard)
            logger.warning(
                "%s. Until then its samples are replaced by others, and count as bad ones towards "
                "data.max_bad_fraction %g",
                bad.reason, self._max_bad_fraction,
            )  # fmt: skip

    def _count(self, item: Item) -> None:
        """Counts bad samples and raises `DataError` when there are too many."""
        self.num_seen += self._images_per_step
        self.bad.update(bad.kind for bad in item.bad)
        fraction = self.num_bad / self.num_seen
        judged = self.num_seen >= _SEEN_BEFORE_STOP or self._max_bad_fraction == 0
        whole = len(item.bad) >= self._images_per_step >= _WHOLE_BATCH
        self._last_bad = item.bad[-1] if item.bad else self._last_bad
        if item.bad and (whole or (judged and fraction > self._max_bad_fraction)):
            raise DataError(self._too_many(self.num_bad, self.num_seen))

    def check_bad(self, bad: int, seen: int) -> None:
        """Checks the counts of a whole run: `bad` of `seen` samples over all processes.

        Raises:
            DataError: more than `max_bad_fraction` of them are bad.
        """
        if bad > self._max_bad_fraction * seen:
            raise DataError(self._too_many(bad, seen))

    def _too_many(self, bad: int, seen: int) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.bad.most_common())
        last = self._last_bad
        return (
            f"{bad} of {seen} samples couldn't be decoded{f' ({kinds})' if kinds else ''}, over data.max_bad_fraction "
            f"{self._max_bad_fraction:g}; {f'the last is {last.name} ({last.reason}); ' if last else ''}fix the data "
            "or raise the limit"
        )


def _parts_of(
    source: SampleSource | StreamSource,
    order: SampleOrder | StreamOrder,
    crops: Crops,
    *,
    rank: int,
    world: int,
) -> Callable[[], Parts]:
    """Returns a function that makes the parts for one iteration; a stream restarts with each iteration."""
    if isinstance(source, StreamSource):
        assert isinstance(order, StreamOrder)
        return partial(StreamParts, source, order, crops, rank, world)
    assert isinstance(order, SampleOrder)
    parts = IndexedParts(source, order, crops, rank, world)
    return lambda: parts


class _SlotParts(Dataset):
    """Maps (step, slot) to this process's part of global batch `step`, with its pixels in buffer `slot`."""

    def __init__(self, parts: Parts, slots: Slots, dtype: str) -> None:
        self._parts, self._slots, self._dtype = parts, slots, dtype

    def __getitem__(self, step_and_slot: tuple[int, int]) -> Item:
        step, slot = step_and_slot
        try:
            return self._parts.fill(step, slot, self._slots.array(slot).view(self._dtype))
        except DataError as error:  # reported to the main process as one line, not as a worker's traceback
            return Item(slot, error=str(error))


__all__ = ["BadSample", "EvalBatch", "EvalReader", "TrainLoader", "spread"]

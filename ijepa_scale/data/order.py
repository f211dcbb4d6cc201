"""The order of the samples: which ones make up which batch, as a pure function of (seed, step).

Each pass over the set permutes the shards, groups them into windows, and permutes the samples inside each window;
global batch t is a slice of that order. Only a cache is kept between calls. Knows nothing of files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ijepa_scale import rng
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted

_WINDOWS_KEPT = 3  # a batch may span windows, and the next batch starts in the last of them


@dataclass(frozen=True)
class _Pass:
    """One pass over the set: its permuted shards and the ends of its windows."""

    number: int
    first_ids: np.ndarray  # (S,) int64: id of the first sample of each permuted shard
    counts: np.ndarray  # (S,) int64: number of samples in each permuted shard
    window_ends: np.ndarray  # (W,) int64: positions in the order of this pass at which the windows end


class SampleOrder:
    """Global batches of sample ids, drawn without replacement within an epoch.

    An epoch is one pass over the set: step // steps_per_epoch, where steps_per_epoch counts the full batches of a
    pass (the last, incomplete one is dropped). The order always runs through whole passes, even if the schedule uses
    another epoch length. Not thread-safe, because it keeps caches.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, batch_size: int, seed: int, window_shards: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.batch_size, self.seed, self.window_shards = batch_size, seed, window_shards
        if batch_size < 1 or window_shards < 1:
            shards = counted(window_shards, "shard")
            raise DataError(f"batch {batch_size} and window of {shards}: give at least 1 of each")
        if self.num_samples < batch_size:
            images = counted(self.num_samples, "image")
            raise DataError(f"the set has {images}, fewer than one batch of {batch_size}; give fewer per batch")
        self._first_ids = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._pass: _Pass | None = None
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        """The number of full global batches in one pass over the set."""
        return self.num_samples // self.batch_size

    def epoch(self, step: int) -> int:
        """Returns the pass over the set that global batch `step` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Returns the sample ids of global batch `step`, (batch_size,) int64, in time linear in a window's size."""
        if step < 0:
            raise ValueError(f"step {step} is negative; steps count from 0")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        begin = step_in_epoch * self.batch_size
        end = begin + self.batch_size
        layout = self._layout(epoch)
        pieces = []
        window = int(np.searchsorted(layout.window_ends, begin, side="right"))
        while begin < end:
            window_begin = int(layout.window_ends[window - 1]) if window else 0
            stop = min(end, int(layout.window_ends[window]))
            pieces.append(self._window(layout, window)[begin - window_begin : stop - window_begin])
            begin, window = stop, window + 1
        return np.concatenate(pieces)

    def window(self, step: int) -> tuple[int, int]:
        """Returns the pass in which global batch `step` begins, and the index of the window in that pass."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        begin = step_in_epoch * self.batch_size
        return epoch, int(np.searchsorted(self._layout(epoch).window_ends, begin, side="right"))

    def shards(self, epoch: int, window: int) -> np.ndarray:
        """Returns the shards of a window, ascending, int64; a pass's last window is followed by the next pass's first.

        So `window` may be one more than the index of the last window.
        """
        if window >= -(-len(self.shard_sizes) // self.window_shards):
            epoch, window = epoch + 1, 0
        permuted = rng.permutation(len(self.shard_sizes), self.seed, "order.shards", epoch)
        return np.sort(permuted[window * self.window_shards : (window + 1) * self.window_shards])

    def part(self, step: int, rank: int, world: int) -> np.ndarray:
        """Returns the consecutive slice of global batch `step` that process `rank` of `world` takes."""
        size = self.part_size(world)
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not among {counted(world, 'process')}; give 0 to {world - 1}")
        return self.batch(step)[rank * size : (rank + 1) * size]

    def part_size(self, world: int) -> int:
        """Returns the images of a global batch that each of `world` processes takes.

        Raises:
            DataError: the batch doesn't divide among the processes.
        """
        return part_size(self.batch_size, world)

    def _layout(self, epoch: int) -> _Pass:
        """Returns the permuted shards of one pass."""
        if self._pass is None or self._pass.number != epoch:
            shards = rng.permutation(len(self.shard_sizes), self.seed, "order.shards", epoch)
            counts = self.shard_sizes[shards]
            ends = np.cumsum(counts)
            last = np.arange(self.window_shards, len(shards) + self.window_shards, self.window_shards) - 1
            window_ends = ends[np.minimum(last, len(shards) - 1)]
            self._pass = _Pass(epoch, self._first_ids[shards], counts, window_ends)
        return self._pass

    def _window(self, layout: _Pass, window: int) -> np.ndarray:
        """Returns the sample ids of one window of a pass, permuted."""
        key = (layout.number, window)
        if key not in self._windows:
            shards = slice(window * self.window_shards, (window + 1) * self.window_shards)
            firsts, counts = layout.first_ids[shards], layout.counts[shards]
            ids = np.concatenate([np.arange(f, f + n, dtype=np.int64) for f, n in zip(firsts, counts, strict=True)])
            # unique for each window of each pass: a pass has no more windows than shards
            number = layout.number * len(self.shard_sizes) + window
            self._windows[key] = ids[rng.permutation(len(ids), self.seed, "order.window", number)]
            while len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]


def part_size(batch_size: int, world: int) -> int:
    """Returns the images of a global batch that each of `world` processes takes.

    Raises:
        DataError: the batch doesn't divide among the processes.
    """
    if batch_size % world:
        near = max(1, round(batch_size / world)) * world
        raise DataError(f"batch {batch_size} is not divisible by {counted(world, 'process')}; try {near}")
    return batch_size // world

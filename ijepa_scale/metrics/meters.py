"""Meters of the training loop: numbers are summed on their device and fetched once per row.

Must not depend on engines or process groups: the caller passes a function that averages over processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ijepa_scale.metrics.own_time import OwnTime, slowest

Clock = Callable[[], float]
Reduce = Callable[[Tensor], Tensor]

DATA_WAIT = "data_wait_ms"
STEP = "step_ms"


def feature_std(features_BUD: Tensor, patches_BU: Tensor, num_patches: int) -> Tensor:
    """Returns how much target features depend on the image, a float32 scalar on their device: the collapse alarm.

    `features_BUD` are layer-normed features (B images, U tokens each, D dims) of the patch indices `patches_BU` int64,
    which are below `num_patches`. For each dim, this takes the standard deviation over the images around the mean of
    each patch index, pooled over the indices (unbiased, so the number of images doesn't matter), then the mean over
    dims.

    Layer-normed features have variance 1 over their dims, so the result is between 0 and about 1. Watch its trend: it
    falls to 0 when the output no longer depends on the image, even if it still depends on the patch index. It is NaN if
    no patch index occurs in two images. Doesn't synchronise.
    """
    rows, index = features_BUD.detach().flatten(0, 1).float(), patches_BU.flatten()
    empty = rows.new_zeros(num_patches, rows.shape[1])
    counts = rows.new_zeros(num_patches, 1).index_add_(0, index, rows.new_ones(len(rows), 1))
    means = empty.index_add(0, index, rows) / counts.clamp(min=1)
    squares = (rows - means.index_select(0, index)).square_().sum(dim=0)  # an index of one image adds nothing
    return (squares / (counts - 1).clamp(min=0).sum()).sqrt_().mean()


class Meters:
    """Averages named numbers between two calls of `flush`, and times steps and waits for data.

    `add` and the timers never synchronise; `flush` does, once. The step time is the wall time between flushes, minus
    the time inside `paused`, divided by the number of steps; so it includes queued device work. The first step of a
    process compiles and allocates: inside `warming_up`, its numbers are counted but its time is not.
    """

    def __init__(self, device: torch.device | str, clock: Clock = time.perf_counter) -> None:
        self._device = torch.device(device)
        self._clock = clock
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | int] = {}
        self.own_time = OwnTime(self._device, clock)
        self.warm_up_s: float | None = None
        self._reset_timers()

    def _reset_timers(self) -> None:
        self._started = self._clock()
        self._waited_s = 0.0
        self._paused_s = 0.0
        self._steps = 0
        self.own_time.reset()

    def add(self, name: str, value: Tensor | float, count: int = 1) -> None:
        """Adds `value`, a mean over `count` items, to the mean `name`; a scalar tensor stays on its device."""
        scalar = value.detach().float() if isinstance(value, Tensor) else value
        self._sums[name] = self._sums.get(name, 0.0) + scalar * count
        self._counts[name] = self._counts.get(name, 0) + count

    def timed(self, batches: Iterable) -> Iterator:
        """Yields from `batches`, and times `next()` as the wait for data. Starts the clock of the first row."""
        self._reset_timers()
        iterator = iter(batches)
        while True:
            before = self._clock()
            self.own_time.begin()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_s += self._clock() - before
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside (evaluation, checkpoints) from the step time."""
        before = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - before

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Records the time spent inside as `warm_up_s`, then restarts the clock of the first row. Synchronises."""
        before = self._clock()
        yield
        self._wait_for_device()
        self.warm_up_s = self._clock() - before
        self._reset_timers()

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # host sync: read the clock only after the device is done

    def count_step(self, stopped: Tensor | None = None, **values: Tensor | float) -> None:
        """Adds the numbers of one optimiser step unless `stopped`, a scalar on the device, isn't 0; and counts it."""
        for name, value in values.items():
            if stopped is None:
                self.add(name, value)
                continue
            taken = stopped == 0
            scalar = torch.as_tensor(value, dtype=torch.float32, device=stopped.device).detach()
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(taken, scalar, 0.0)
            self._counts[name] = self._counts.get(name, 0) + taken
        self._steps += 1

    def flush(self, reduce: Reduce | None = None, gather: Reduce | None = None) -> dict[str, float]:
        """Returns the means since the last call, plus `data_wait_ms` and `step_ms` if there were steps; then resets.

        Synchronises with the device and transfers once. `reduce` averages a float64 vector over the processes, which
        must all have added the same names. With `gather`, which returns the vectors of all processes, the result also
        says who was slowest, after one more transfer.
        """
        names = sorted(self._sums)
        means = [self._mean(name) for name in names]
        self._wait_for_device()
        step_s = (self._clock() - self._started - self._paused_s) / max(1, self._steps)
        wait_s = self._waited_s / max(1, self._steps)
        timers = torch.tensor([1e3 * wait_s, 1e3 * step_s], dtype=torch.float64, device=self._device)
        vector = torch.cat([torch.stack(means), timers]) if means else timers
        values = (vector if reduce is None else reduce(vector)).tolist()  # host sync: the one transfer of a row
        timed = [*names, DATA_WAIT, STEP] if self._steps else names
        found = dict(zip(timed, values, strict=False))
        if gather is not None and self._steps:
            own = [1e3 * self.own_time.sum_s() / self._steps, 1e3 * wait_s]
            times = gather(torch.tensor(own, dtype=torch.float64, device=self._device))
            found |= slowest(times.tolist())  # host sync: once per row
        self._sums.clear()
        self._counts.clear()
        self._reset_timers()
        return found

    def state(self, gather: Reduce) -> dict[str, list[list[float]]]:
        """Returns the sums since the last flush: for each name (sum, count, whether it is on the device) by process.

        Empty, without communication, right after a flush. Otherwise transfers once, and `gather` returns the vectors of
        all processes, which must all have added the same names.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        figures = [
            torch.as_tensor(value, dtype=torch.float64, device=self._device)
            for name in names
            for value in (self._sums[name], self._counts[name], float(isinstance(self._sums[name], Tensor)))
        ]
        by_process = gather(torch.stack(figures)).tolist()  # host sync: once per save
        return {name: [each[3 * i : 3 * i + 3] for each in by_process] for i, name in enumerate(names)}

    def load_state(self, state: Mapping[str, Sequence[Sequence[float]]], rank: int, size: int) -> None:
        """Takes over this process's sums from `state`. Of another number of processes, each takes their mean."""
        for name, by_process in state.items():
            same = by_process[rank : rank + 1] if len(by_process) == size else by_process
            total, count, on_device = (sum(figures) / len(same) for figures in zip(*same, strict=True))
            self._sums[name] = torch.tensor(total, dtype=torch.float32, device=self._device) if on_device else total
            self._counts[name] = round(count)

    def _mean(self, name: str) -> Tensor:
        """Returns the mean of `name` so far, a float64 scalar on the device."""
        return torch.as_tensor(self._sums[name], dtype=torch.float64, device=self._device) / self._counts[name]

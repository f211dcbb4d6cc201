"""Numbers of the training loop, added up where they are and fetched once per row. Floor 3.

Knows no engine and no process group: averaging over processes is a callable that it is handed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Clock = Callable[[], float]
Reduce = Callable[[Tensor], Tensor]

DATA_WAIT = "data_wait_ms"
STEP = "step_ms"


def feature_std(features_BND: Tensor) -> Tensor:
    """Returns how much target features depend on the image, a float32 scalar on their device: the collapse alarm.

    `features_BND` are the layer-normed features of all tokens (B images, N places, D dims). Per place
    and dim, the standard deviation over the images; then the mean over places and dims. Layer-normed
    features have variance 1 over their dims, so this lies between 0 and about 1; what counts is its course:
    it goes to 0 when the output no longer depends on the image, even if it still depends on the place. NaN
    for a single image, which has nothing to be compared with. Doesn't synchronise.
    """
    if features_BND.shape[0] < 2:
        return torch.full((), float("nan"), device=features_BND.device)
    return features_BND.detach().float().std(dim=0, correction=0).mean()


class Meters:
    """Means of named numbers since the last `flush`, and the time spent per step and waiting for data.

    `add` and the timers never synchronise; `flush` does, once. Step time is wall time between flushes
    over the steps done, so that queued device work is counted, less the time inside `paused`.
    """

    def __init__(self, device: torch.device | str, clock: Clock = time.perf_counter) -> None:
        self._device = torch.device(device)
        self._clock = clock
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._reset_timers()

    def _reset_timers(self) -> None:
        self._started = self._clock()
        self._waited_s = 0.0
        self._paused_s = 0.0
        self._steps = 0

    def add(self, name: str, value: Tensor | float, count: int = 1) -> None:
        """Adds `value`, the mean of `count` things, to the mean `name`; a scalar tensor stays on its device."""
        scalar = value.detach().float() if isinstance(value, Tensor) else value
        self._sums[name] = self._sums.get(name, 0.0) + scalar * count
        self._counts[name] = self._counts.get(name, 0) + count

    def timed(self, batches: Iterable) -> Iterator:
        """Yields from `batches`, timing `next()` itself as the wait for data. The time of the first row begins here."""
        self._reset_timers()
        iterator = iter(batches)
        while True:
            before = self._clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_s += self._clock() - before
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside (evaluation, checkpoints) out of the step time."""
        before = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - before

    def end_step(self) -> None:
        """Counts one optimiser step."""
        self._steps += 1

    def flush(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Returns the means since the last call, with `data_wait_ms` and `step_ms`, and starts anew.

        Synchronises with the device and transfers once. `reduce` averages a float64 vector over the
        processes; all of them must have added the same names.
        """
        names = sorted(self._sums)
        means = [self._mean(name) for name in names]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # host sync: the clock must not be read ahead of the device
        step_s = (self._clock() - self._started - self._paused_s) / max(1, self._steps)
        wait_s = self._waited_s / max(1, self._steps)
        timers = torch.tensor([1e3 * wait_s, 1e3 * step_s], dtype=torch.float64, device=self._device)
        vector = torch.cat([torch.stack(means), timers]) if means else timers
        values = (vector if reduce is None else reduce(vector)).tolist()  # host sync: the one transfer of a row
        self._sums.clear()
        self._counts.clear()
        self._reset_timers()
        return dict(zip([*names, DATA_WAIT, STEP], values, strict=True))

    def _mean(self, name: str) -> Tensor:
        """Returns the mean of `name` so far, a float64 scalar on the device."""
        return torch.as_tensor(self._sums[name], dtype=torch.float64, device=self._device) / self._counts[name]

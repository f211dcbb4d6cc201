"""The time that a process takes by itself in each step, before it waits for others, and who takes the most of it.

Must not know engines: they say when they are about to wait.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

SLOWEST = ("slowest_process", "slowest_own_ms", "slowest_data_wait_ms", "median_own_ms")
_SLOW = 1.2  # times the median
_MATTERS = 0.05  # of a step: less would be lost in the noise of short own times


class OwnTime:
    """Sums the time from `begin` to the first `end` after it, over the steps of a row.

    Neither synchronises: on a GPU both record an event, so the time is the device's, and includes that in which the
    device had nothing to do.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._is_cuda = device.type == "cuda"
        self._clock = clock
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was timed."""
        self._begun: Any = None
        self._sum_s = 0.0
        self._events.clear()

    def begin(self) -> None:
        """Call before a step asks for its batch."""
        self._begun = self._now()

    def end(self) -> None:
        """Call where this process may wait for others for the first time in a step; later calls change nothing."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        if self._is_cuda:
            self._events.append((begun, self._now()))
        else:
            self._sum_s += self._now() - begun

    def _now(self) -> Any:
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sum_s(self) -> float:
        """Returns the sum, in seconds. On a GPU, call it once the device is done."""
        return self._sum_s + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1e3


def slowest(times: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """Returns the fields `SLOWEST` from (own time, data wait) of each process, in ms per step; {} for one process.

    Of an even number of processes, the median is the lower of the two in the middle, so one of two can be slow.
    """
    if len(times) < 2:
        return {}
    own = [mine for mine, _ in times]
    process = max(range(len(own)), key=own.__getitem__)
    return dict(zip(SLOWEST, (process, *times[process], statistics.median_low(own)), strict=True))


def slow_process(row: Mapping[str, Any]) -> str | None:
    """Returns who holds the others up, and by how much, in words; None if no process does.

    That is one whose own time is over 1.2 times the median, and above it by 5% of a step.
    """
    process, own, wait, median = (row.get(name) for name in SLOWEST)
    if process is None or own is None or wait is None or median is None:
        return None
    if own <= _SLOW * median or own - median <= _MATTERS * (row.get("step_ms") or 0.0):
        return None
    return f"slow: process {process}, {own:.0f} ms of its own ({wait:.0f} for data), median {median:.0f}"

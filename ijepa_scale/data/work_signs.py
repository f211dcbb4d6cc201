"""Lets a worker process show that it goes on with an item that takes long. Knows nothing of items or of watching."""

from __future__ import annotations

import numpy as np

from ijepa_scale.data.shared_counts import SharedCounts


class WorkSigns:
    """A count for each worker, shared with the processes that this object is pickled to."""

    def __init__(self, num_workers: int) -> None:
        self._counts = SharedCounts(num_workers)

    def total(self) -> int:
        """Returns a number that changes when any worker shows a sign."""
        return int(self._counts.values.sum())

    def come_from(self, worker: int) -> None:
        """Makes this process's signs those of a worker."""
        global _own
        _own = self._counts.values[worker : worker + 1]


def show_work() -> None:
    """Shows that what this process's item waits for goes on. Does nothing in a process that is no worker."""
    if _own is not None:
        _own[0] += 1


_own: np.ndarray | None = None

__all__ = ["WorkSigns", "show_work"]

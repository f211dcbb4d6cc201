"""Lets a worker process show that it goes on with an item that takes long. Knows nothing of items or of watching."""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np


class WorkSigns:
    """A count for each worker, shared with the processes that this object is pickled to."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._map(os.memfd_create("ijepa-scale-signs"))

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self._num_workers, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._num_workers = state["num_workers"]
        self._map(state["descriptor"].detach())

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor, num_bytes = descriptor, 8 * self._num_workers
        os.ftruncate(descriptor, num_bytes)
        self._counts = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.int64)

    def total(self) -> int:
        """Returns a number that changes when any worker shows a sign."""
        return int(self._counts.sum())

    def come_from(self, worker: int) -> None:
        """Makes this process's signs those of a worker."""
        global _own
        _own = self._counts[worker : worker + 1]


def show_work() -> None:
    """Shows that what this process's item waits for goes on. Does nothing in a process that is no worker."""
    if _own is not None:
        _own[0] += 1


_own: np.ndarray | None = None

__all__ = ["WorkSigns", "show_work"]

"""Numbers that processes share without a lock. Knows nothing of what they count."""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np


class SharedCounts:
    """`count` numbers, 0 at first, shared with the processes that this object is pickled to.

    `values`, (count,) int64, is a view of them. Each may be read and written at any time. No lock guards them, so a
    process that is killed can't leave one behind that is held for ever.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._map(os.memfd_create("ijepa-scale-counts"))

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self._count, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._map(state["descriptor"].detach())

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor, num_bytes = descriptor, 8 * self._count
        os.ftruncate(descriptor, num_bytes)
        self.values = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.int64)


__all__ = ["SharedCounts"]

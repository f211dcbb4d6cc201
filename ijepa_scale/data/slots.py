"""Reusable buffers that worker processes fill and the training process empties.

A fresh 60 MB buffer per batch costs as much in page faults as decoding into it (measured on Zen 4), so each buffer
is allocated once. They live in an anonymous memory file, which the size of /dev/shm (64 MB in a container) doesn't
limit.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch


class Slots:
    """`count` buffers of `size` bytes, shared with the worker processes that this object is pickled to."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._pinned = False
        self._descriptor = os.memfd_create("ijepa-scale-batches")
        os.ftruncate(self._descriptor, count * size)  # pages take memory only once they are written to
        self._memory = mmap.mmap(self._descriptor, count * size)

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "size": self.size, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.count, self.size, self._pinned = state["count"], state["size"], False
        self._descriptor = state["descriptor"].detach()
        self._memory = mmap.mmap(self._descriptor, self.count * self.size)

    def __del__(self) -> None:
        if getattr(self, "_pinned", False):
            torch.cuda.cudart().cudaHostUnregister(self._whole().data_ptr())
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def array(self, slot: int) -> np.ndarray:
        """Returns a view of buffer `slot`, (size,) uint8."""
        return np.frombuffer(self._memory, np.uint8, self.size, slot * self.size)

    def tensor(self, slot: int, count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Returns a view of the first `count` numbers of buffer `slot`, (count,) of this type."""
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=slot * self.size)

    def pin(self) -> None:
        """Locks the pages in memory and registers them with CUDA, so that copies to the device are asynchronous.

        Raises:
            RuntimeError: CUDA refuses, for instance because of the limit on locked memory.
        """
        whole = self._whole()
        code = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0))
        if code:
            raise RuntimeError(
                f"{whole.numel()} bytes for batches can't be page-locked (CUDA error {code}); "
                "lower data.prefetch or data.workers, or raise ulimit -l"
            )
        self._pinned = True

    def _whole(self) -> torch.Tensor:
        return torch.frombuffer(self._memory, dtype=torch.uint8)

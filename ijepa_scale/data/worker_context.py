"""How worker processes are started: by a fork server, and sharing no lock that one of them could die with."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from typing import Any

from ijepa_scale.data.shared_counts import SharedCounts


class WorkerContext(ForkServerContext):
    """The context of torch's DataLoader. Its `Event` needs no lock.

    The DataLoader asks its event whether the work is done in the main process and, after each item, in the workers.
    One of `multiprocessing` takes a lock for that. A worker that was killed in that moment, as when memory runs out,
    kept it, and the main process waited for it for ever.
    """

    def Event(self) -> Any:  # noqa: N802
        """Returns what the DataLoader uses of `multiprocessing.Event`."""
        return _Flag()


class _Flag:
    def __init__(self) -> None:
        self._counts = SharedCounts(1)

    def set(self) -> None:
        self._counts.values[0] = 1

    def is_set(self) -> bool:
        return bool(self._counts.values[0])


__all__ = ["WorkerContext"]

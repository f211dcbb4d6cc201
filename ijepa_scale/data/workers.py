"""Worker processes that produce items in order. Knows nothing of what the items are."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.forkserver import ensure_running
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from ijepa_scale.data.work_signs import WorkSigns
from ijepa_scale.data.worker_context import WorkerContext
from ijepa_scale.data.worker_watch import WorkerWatch
from ijepa_scale.errors import DataError
from ijepa_scale.stopping import SIGNALS
from ijepa_scale.terminal import log_to_terminal

logger = logging.getLogger(__name__)

# what torch's loader raises when a worker has gone, while it waits or while it unpacks what that had sent
_LOST = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Recovery:
    """What happens to workers that end or hang; see `set_recovery`."""

    restarts: int = 3
    timeout_s: float = 0.0  # without an item, or a sign of work on it, while one is waited for; 0: for ever


class _Process:
    recovery = Recovery()
    is_set = False  # by the settings data.worker_restarts and data.worker_timeout, which commands without data lack
    num_restarts = 0


def set_recovery(recovery: Recovery) -> None:
    """Sets the recovery of all loaders of this process to that of the section `data`, and counts restarts from 0.

    The loaders share that count. Without a call, workers may take any time, as for items that are whole shards.
    """
    _process.recovery, _process.is_set, _process.num_restarts = recovery, True, 0


_process = _Process()


def ordered_loader(
    dataset: Dataset[Any],
    items: Iterable[Any],
    *,
    workers: int,
    prefetch: int,
    after_restart: str = "",
) -> OrderedLoader:
    """Returns a loader of dataset[i] for i in `items`, in order, computed by `workers` processes.

    With 0 workers the items are computed in this process. Workers come from a fork server: the training process
    can't be forked safely once CUDA or threads have started, and spawning would import torch in every worker. The
    first batch of 2 workers takes 2.6 s on one busy core (Zen 4), once per run. A worker runs one thread, leaves
    signals that ask a run to stop to the main process, and ends with it.

    If a worker ends or hangs, all of them are replaced, and what wasn't delivered is computed again. `after_restart`
    says what changes then, if dataset[i] depends on more than i.
    """
    return OrderedLoader(dataset, items, workers, prefetch=prefetch, after_restart=after_restart)


class OrderedLoader:
    """The loader of `ordered_loader`."""

    def __init__(
        self,
        dataset: Dataset[Any],
        items: Iterable[Any],
        workers: int,
        *,
        prefetch: int,
        after_restart: str,
    ) -> None:
        self._dataset, self._items, self._workers = dataset, items, workers
        self._prefetch, self._after_restart = prefetch, after_restart

    def __len__(self) -> int:
        return len(cast(Sized, self._items))

    def __iter__(self) -> Iterator[Any]:
        """Yields the items.

        Raises:
            DataError: workers ended or hung more often than they may be restarted.
        """
        if not self._workers:
            yield from self._loader(self._items, None)
            return
        items = _Undelivered(self._items)
        restarted = False
        while not items.all_delivered:
            try:
                signs = WorkSigns(self._workers)
                iterator = iter(self._loader(items.draw(), signs, restarted))
                watch = WorkerWatch(iterator, _process.recovery.timeout_s, signs)
            except _LOST as error:  # the fork server has gone
                self._count_restart(f"data workers couldn't be started ({error or type(error).__name__})", len(items))
                restarted = True
                continue
            lost = False
            try:
                with watch:
                    while not (items.all_delivered or lost):
                        try:
                            with watch.waiting():
                                item = next(iterator)
                        except _LOST:
                            lost = watch.lost()
                            if not lost:
                                raise
                        else:
                            items.delivered()
                            yield item
            finally:
                del iterator  # ends the workers
                watch.end()
            if lost:
                if watch.unkillable:
                    raise DataError(
                        f"data workers {', '.join(map(str, watch.unkillable))} can't be ended, as when a disk or a "
                        "network file system doesn't answer; check it, and start again"
                    )
                self._count_restart(watch.reason(), len(items), hung=watch.hung)
                restarted = True

    def _loader(self, items: Iterable[Any], signs: WorkSigns | None, restarted: bool = False) -> DataLoader[Any]:
        options: dict[str, Any] = {}
        if signs is not None:
            context = WorkerContext()
            context.set_forkserver_preload(["__main__", "ijepa_scale.data.loader"])
            _start_server()
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": self._prefetch,
                "worker_init_fn": partial(_start_worker, signs),
            }
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=items,
            collate_fn=_unchanged,
            num_workers=self._workers,
            generator=torch.Generator() if restarted else None,  # the global one must not notice a restart
            **options,
        )

    def _count_restart(self, reason: str, num_items: int, *, hung: bool = False) -> None:
        """Logs a restart of the workers.

        Raises:
            DataError: there were too many.
        """
        limit = _process.recovery.restarts
        _process.num_restarts += 1
        fewer = f"lower the number of workers{' or data.prefetch' if _process.is_set else ''}"
        if _process.num_restarts > limit:
            before = f"after {limit} restarts" if limit else "and data.worker_restarts is 0"
            remedies = ["check that the data can be read"]
            if hung:
                seconds = _process.recovery.timeout_s
                remedies.append(f"raise data.worker_timeout ({seconds:g} s) if an item takes that long")
            else:
                remedies.insert(0, f"{fewer} or give the job more memory")
            if _process.is_set:
                remedies.append("raise data.worker_restarts")
            raise DataError(f"{reason}, {before}; {', or '.join(remedies)}; then start again")
        advice = "" if hung else f". If memory is short, {fewer}"
        logger.warning(
            "%s; starting the %d workers again (%d of %d times), which do the work that wasn't delivered, %d items, "
            "again%s%s",
            reason, self._workers, _process.num_restarts, limit, num_items, self._after_restart, advice,
        )  # fmt: skip


class _Undelivered:
    """Items in order, of which those that were drawn but not delivered can be drawn again."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._drawn: deque[Any] = deque()
        self._exhausted = False

    def __len__(self) -> int:
        return len(self._drawn)

    @property
    def all_delivered(self) -> bool:
        """Whether no item is left, as far as known: the items are drawn ahead."""
        return self._exhausted and not self._drawn

    def draw(self) -> Iterator[Any]:
        """Yields the items that weren't delivered."""
        yield from list(self._drawn)
        for item in self._items:
            self._drawn.append(item)
            yield item
        self._exhausted = True

    def delivered(self) -> None:
        """Forgets the oldest item."""
        self._drawn.popleft()


def _start_server() -> None:
    """Starts the fork server and Python's resource tracker with these signals blocked, which workers inherit.

    A terminal or a scheduler sends them to all processes, and the run needs its workers until it has stopped by itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # the tracker needs them blocked too, and has SIGTERM and SIGINT unblocked here afterwards (Python 3.10 to 3.13)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(signs: WorkSigns, worker: int) -> None:
    signs.come_from(worker)
    torch.set_num_threads(1)
    log_to_terminal(logging.WARNING)  # else logging prints warnings itself, with names as they are
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for target in (_end_with_parent, _end_when_parent_says):
        threading.Thread(target=target, daemon=True).start()


def _end_when_parent_says() -> None:
    """Ends this worker when the process that requested it, and no other, sends SIGTERM."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker always has one
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    """Ends this worker when the process that requested it has ended, even if it was killed.

    torch's loader watches the parent process, which here is the fork server. The fork server in turn waits for its
    workers, so without this thread workers would outlive a killed run for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker always has one
    parent.join()
    os._exit(1)


def _unchanged(item: Any) -> Any:
    return item

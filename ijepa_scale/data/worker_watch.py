"""Watches the worker processes of one loader: notes one that has ended or hangs, and then ends the others.

They share a queue, whose lock a process that is killed may hold for ever, and buffers, which a process that goes on may
write to. So all of them go before new ones start. Knows nothing of items.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any

import psutil

from ijepa_scale.data.work_signs import WorkSigns

_LOOK_S = 1.0  # between looks; a worker that ends is seen at once
_TOGETHER_S = 0.05  # in which workers end that end for one reason
_NOTICE_S = 2.0  # in which an ended worker is surely seen
_GO_S = 10.0  # in which a killed process is gone, unless a disk or network keeps it
_BETWEEN_S = 0.005  # between looks at whether it is
_NO_SERVER = 255  # exit code that `multiprocessing` assumes of a process whose fork server has gone


class WorkerWatch:
    """Watches the workers of a running iterator of torch's DataLoader.

    `timeout_s`: how long `waiting` may last without a sign of work; 0 is for ever. A process that was stopped itself
    doesn't count that time.
    """

    def __init__(self, iterator: Any, timeout_s: float, signs: WorkSigns) -> None:
        self._workers = list(iterator._workers)
        self._results = iterator._worker_result_queue
        self._timeout_s, self._signs = timeout_s, signs
        self._processes = [found for worker in self._workers if (found := _process_of(worker.pid)) is not None]
        self._first: list[int] = []  # numbers of the workers that ended by themselves
        self._hang = ""
        self._left: list[int] = []  # process ids that can't be ended
        self._waiting = False
        self._ended = threading.Event()
        self._reading, self._writing = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="worker watch", daemon=True)

    def __enter__(self) -> WorkerWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Call around each wait for an item."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def lost(self) -> bool:
        """Returns whether a worker has ended or hung, which takes 2 s if none has. All of them are gone then."""
        if not self._ended.wait(_NOTICE_S):
            return False
        self._thread.join()
        return True

    def reason(self) -> str:
        """Returns what happened to the workers. Call it after `lost`, in the thread that uses the iterator."""
        if self._hang:
            return self._hang
        codes = {self._workers[number].pid: self._workers[number].exitcode for number in self._first}
        if _NO_SERVER in codes.values():
            return "the process that starts data workers was ended"
        return " and ".join(f"data worker {pid} {_how(code)}" for pid, code in codes.items())

    @property
    def hung(self) -> bool:
        """Whether the workers were ended because they gave nothing in time."""
        return bool(self._hang)

    @property
    def unkillable(self) -> list[int]:
        """The ids of processes that didn't end when they were killed."""
        return self._left

    def end(self) -> None:
        """Kills the workers that are left, and waits until they are gone."""
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + _GO_S
        self._left += [process.pid for process in self._processes if not _goes(process, deadline)]
        self._processes = []

    def _watch(self) -> None:
        sentinels = {worker.sentinel: number for number, worker in enumerate(self._workers)}
        waited, before, signs = 0.0, time.monotonic(), self._signs.total()
        while True:
            ready = connection.wait([*sentinels, self._reading], _LOOK_S)
            if self._reading in ready:
                return
            now = time.monotonic()
            work, signs = signs, self._signs.total()
            waited = waited + min(now - before, 2 * _LOOK_S) if self._waiting and work == signs else 0.0
            before = now
            if ready:
                time.sleep(_TOGETHER_S)
                self._first = [number for one, number in sentinels.items() if connection.wait([one], 0)]
            elif 0 < self._timeout_s < waited:
                self._hang = self._describe_hang(waited)
            else:
                continue
            self.end()
            self._results._writer.close()  # ends the reading of an item that a worker had half sent
            self._ended.set()
            return

    def _describe_hang(self, waited: float) -> str:
        stopped = [str(process.pid) for process in self._processes if _status(process) == psutil.STATUS_STOPPED]
        which = f"{', '.join(stopped)} stopped" if stopped else "all alive"
        pids = ", ".join(str(worker.pid) for worker in self._workers)
        return f"data workers {pids} gave nothing for {waited:.0f} s ({which})"


def _how(code: int | None) -> str:
    """Returns how a process with this exit code has ended."""
    if code is None or code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    memory = ", as when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{memory}"


def _process_of(pid: int) -> psutil.Process | None:
    """Returns a process, which is never mistaken for a later one of the same number; None if it has gone."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _goes(process: psutil.Process, deadline: float) -> bool:
    """Returns whether a process that was killed ends before `deadline`, a time of `time.monotonic`."""
    while _status(process) not in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        if time.monotonic() > deadline:
            return False
        time.sleep(_BETWEEN_S)
    return True


def _status(process: psutil.Process) -> str | None:
    """Returns psutil's name for what a process does; None if it has gone."""
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None


__all__ = ["WorkerWatch"]

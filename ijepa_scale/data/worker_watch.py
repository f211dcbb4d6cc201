"""Watches the worker processes of one loader: notes one that has ended or hangs, and then ends the others.

They share a queue, whose lock a process that is killed may hold for ever, and buffers, which a process that goes on may
write to. So all of them go before new ones start. Knows nothing of items.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

_LOOK_S = 1.0  # between looks; a worker that ends is seen at once
_TOGETHER_S = 0.05  # in which workers end that end for one reason
_NOTICE_S = 2.0  # in which an ended worker is surely seen
_GO_S = 10.0  # in which a killed process is gone, unless a disk or network keeps it
_NO_SERVER = 255  # exit code that `multiprocessing` assumes of a process whose fork server has gone


class WorkerWatch:
    """Watches the workers of a running iterator of torch's DataLoader.

    `timeout_s`: how long `waiting` may last; 0 is for ever. A process that was stopped itself doesn't count that time.
    """

    def __init__(self, iterator: Any, timeout_s: float) -> None:
        self._workers = list(iterator._workers)
        self._pinning = hasattr(iterator, "_pin_memory_thread")
        self._results = iterator._worker_result_queue
        self._timeout_s = timeout_s
        self._descriptors: list[int | None] = [_descriptor_of(worker.pid) for worker in self._workers]
        self._first: list[int] = []  # numbers of the workers that ended by themselves
        self._hang = ""
        self._left: list[int | None] = []  # process ids that can't be ended
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
    def unkillable(self) -> list[int | None]:
        """The ids of processes that didn't end when they were killed."""
        return self._left

    def end(self) -> None:
        """Kills the workers that are left, and waits until they are gone."""
        for descriptor in self._descriptors:
            if descriptor is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for worker, descriptor in zip(self._workers, self._descriptors, strict=True):
            if descriptor is not None:
                if not _readable(descriptor, _GO_S):
                    self._left.append(worker.pid)
                os.close(descriptor)
        self._descriptors = [None] * len(self._workers)

    def _watch(self) -> None:
        sentinels = {worker.sentinel: number for number, worker in enumerate(self._workers)}
        waited, before = 0.0, time.monotonic()
        while True:
            ready = connection.wait([*sentinels, self._reading], _LOOK_S)
            if self._reading in ready:
                return
            now = time.monotonic()
            waited = waited + min(now - before, 2 * _LOOK_S) if self._waiting else 0.0
            before = now
            if ready:
                time.sleep(_TOGETHER_S)
                self._first = [number for one, number in sentinels.items() if connection.wait([one], 0)]
            elif 0 < self._timeout_s < waited:
                self._hang = self._describe_hang(waited)
            else:
                continue
            self.end()
            if not self._pinning:  # ends the reading of an item that a worker had half sent
                self._results._writer.close()
            self._ended.set()
            return

    def _describe_hang(self, waited: float) -> str:
        stopped = [str(worker.pid) for worker in self._workers if _state(worker.pid) == "T"]
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


def _descriptor_of(pid: int) -> int | None:
    """Returns a descriptor of a process, which stays that of this one; None if it has gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _readable(descriptor: int, seconds: float) -> bool:
    """Returns whether the process with this descriptor ends within some seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _state(pid: int) -> str | None:
    """Returns the letter of a process's state, such as T for stopped; None if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


__all__ = ["WorkerWatch"]

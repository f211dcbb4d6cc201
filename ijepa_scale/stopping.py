"""Notes that this process was asked to stop, by a signal or because its launcher has ended. Knows no run.

A thread reads the signals, so they are noted even while the main thread waits in a collective.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ijepa_scale.terminal import at_most

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SAME_S = 2.0  # a terminal and a launcher both pass a signal on: within this time it is one
_ORPHAN_S = 8.0  # seconds that a process has to stop after its launcher has ended
_LOOK_S = 1.0  # between looks at the launcher, whose end is noticed at once where the system can tell
_SAYING_S = 2.0  # that the last line may take


class Stopped(Exception):  # noqa: N818 - not an error: the state is saved
    """The run was asked to stop, and has saved its state. Raised on every process."""


class _Process:
    reason: str | None = None
    at = 0.0  # time.monotonic(), of the reason
    last: int | None = None  # signal that asked the newest run to stop, known after its end too
    launchers: tuple[int, ...] = ()  # the processes that started this one, nearest first, if they are to be watched


_process = _Process()


def watch_launcher() -> None:
    """Lets `listening` watch the process that started this one, which isn't to outlive it.

    The command `deepspeed` starts a launcher of its own, and leaves that behind if it ends, so both are watched.
    """
    parent = os.getppid()
    above = _parent_of(parent)
    _process.launchers = (parent, above) if above is not None and _is_deepspeed(above) else (parent,)


def _parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_deepspeed(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) == b"deepspeed" for word in words[:3])


def _orphaned() -> bool:
    """Returns whether a launcher has ended."""
    launchers = _process.launchers
    if not launchers:
        return False
    return os.getppid() != launchers[0] or (len(launchers) > 1 and _parent_of(launchers[0]) != launchers[1])


def reason() -> str | None:
    """Returns why this process was asked to stop, or None if it wasn't."""
    return _process.reason


def last_signal() -> int | None:
    """Returns the signal that asked the newest run of this process to stop, also once it has ended; None without."""
    return _process.last


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Notes signals instead of ending the process. A second one, after 2 s, ends it at once.

    The end of a launcher (`watch_launcher`) is noted too, and ends the process after 8 s at the latest.
    """
    if threading.current_thread() is not threading.main_thread():
        logger.warning("not in the main thread, so signals end this run without a save")
        yield
        return
    _process.reason, _process.last = None, None
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    done = threading.Event()
    before = {number: signal.signal(number, _ignore) for number in SIGNALS}
    for number in SIGNALS:
        signal.siginterrupt(number, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, done), name="stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        done.set()
        os.write(writing, b"\0")
        thread.join()
        _process.reason = None  # what this process does next isn't asked to stop
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def passing_on(processes: Callable[[], Iterable[int | None]]) -> Iterator[Callable[[], None]]:
    """Passes signals on to the processes that this one waits for.

    `processes` returns the ids of those that haven't ended: the number of one that has may be another program's.
    Yields a function to call once they have started, for the signals that came before.
    """
    early: list[int] = []

    def send(number: int, _: Any) -> None:
        found = [process for process in processes() if process is not None]
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        if not found:
            early.append(number)

    def send_early() -> None:
        numbers, early[:] = early[:], []  # `send` keeps them again if all have ended by now
        for number in numbers:
            send(number, None)

    before = {number: signal.signal(number, send) for number in SIGNALS}
    try:
        yield send_early
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_: int, __: Any) -> None:
    """Takes a signal, which the thread has read already."""


def _watch(reading: int, done: threading.Event) -> None:
    with contextlib.ExitStack() as opened:
        events = select.poll()
        events.register(reading, select.POLLIN)
        for launcher in _process.launchers:
            with contextlib.suppress(OSError, AttributeError):  # Linux before 5.3, a container's rules, Python's build
                descriptor = os.pidfd_open(launcher)  # ready once the process has ended
                opened.callback(os.close, descriptor)
                events.register(descriptor, select.POLLIN)
        while not done.is_set():
            ready = [descriptor for descriptor, _ in events.poll(1e3 * _LOOK_S)]
            _look(os.read(reading, 64) if reading in ready else b"")
            for descriptor in ready:
                if descriptor != reading:
                    events.unregister(descriptor)  # it stays ready


def _look(numbers: bytes) -> None:
    """Notes signals, and whether a launcher has ended."""
    for number in numbers:
        if number in SIGNALS:
            _note(number)
    if _orphaned():
        _ask("its launcher has ended")
        if time.monotonic() - _process.at > _ORPHAN_S:
            _end_at_once("its launcher has ended, and it couldn't stop in time", 1)


def _note(number: int) -> None:
    name = signal.Signals(number).name
    if _process.reason is not None and time.monotonic() - _process.at > _SAME_S:
        _end_at_once(f"a second signal, {name}", 128 + number)
    if _process.reason is None:
        _process.last = number
    _ask(name)


def _ask(why: str) -> None:
    if _process.reason is None:
        _process.at, _process.reason = time.monotonic(), why


def _end_at_once(why: str, code: int) -> None:
    """Ends the process, and says why unless nobody reads standard error: a pipe may be closed, or full for ever."""
    try:
        at_most(_SAYING_S, lambda: print(f"process {os.getpid()} ends at once: {why}", file=sys.stderr, flush=True))
    finally:
        os._exit(code)

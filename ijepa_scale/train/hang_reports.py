"""What the processes of a run tell one another, in files, when it hangs, and whom that leaves to blame.

A process that hangs takes part in no collective, so the shared folder of the run is the only place to meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from ijepa_scale import environment

DATA = "waiting for data"
_NAME = "process-{:05d}.txt"
_WAITING = ("/torch/distributed/", "/torch/cuda/", "/torch/autograd/graph.py")  # the last runs backward, in C++
_SHOWN = 8  # processes that a message names
_USUAL = (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING, psutil.STATUS_IDLE)


class Identity(NamedTuple):
    """Where a process of the run is."""

    pid: int
    host: str
    created: float  # seconds since the epoch, so that another process with the same pid isn't taken for it
    pids: str = ""  # the namespace of its pid; equal host names may be those of two machines

    @classmethod
    def own(cls) -> Identity:
        """Returns that of this process."""
        return cls(os.getpid(), socket.gethostname(), psutil.Process().create_time(), environment.namespace("pid"))

    @property
    def place(self) -> tuple[str, str]:
        """What is equal where processes see one another by their pids."""
        return self.host, self.pids

    def state(self) -> str:
        """Returns what the process does as the system sees it, as far as this host knows."""
        if self.place != (socket.gethostname(), environment.namespace("pid")):
            return f"it has stopped, or {self.host} doesn't answer"
        try:
            process = psutil.Process(self.pid)
            return f"it is {process.status()}" if process.create_time() == self.created else "it has ended"
        except psutil.Error:
            return "it has ended"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a process says of itself."""

    asks: bool  # it has seen no progress, so the others are to answer
    hangs: bool  # and not because it takes its time, as in a save
    phase: str
    step: int
    waits: bool  # its main thread waits for other processes, or for its device
    helpers: dict[str, list[int]]  # pids of the processes that it has started, by what the system says they do
    count: int  # of the reports that the process has written; one that still answers goes on counting


def report_of(phase: str, step: int, *, asks: bool, hangs: bool, count: int) -> Report:
    """Returns the report of this process."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING)
    return Report(asks=asks, hangs=hangs, phase=phase, step=step, waits=waits, helpers=helpers(), count=count)


def helpers() -> dict[str, list[int]]:
    """Returns the pids of all processes that this one has started, such as a loader's workers, by their states."""
    found: dict[str, list[int]] = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.setdefault(child.status(), []).append(child.pid)
    return found


def stacks() -> str:
    """Returns the Python stack of each thread of this process, innermost call first, the main thread's at the top."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    text = []
    for thread, frame in sorted(sys._current_frames().items(), key=lambda found: found[0] != main):
        # reads no source files, which may be on the file system that hangs
        lines = (f"  {at.f_code.co_filename}:{line} {at.f_code.co_name}" for at, line in traceback.walk_stack(frame))
        text.append("\n".join([f"thread {names.get(thread, thread)}", *lines]))
    return "\n\n".join(text) + "\n"


def write(folder: Path, rank: int, report: Report) -> None:
    """Writes the report of a process, with its stacks, in one step.

    Raises:
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME.format(rank)
    temporary = path.with_suffix(".tmp")
    at = time.strftime("%Y-%m-%d %H:%M:%S %z")
    head = json.dumps(dataclasses.asdict(report))
    temporary.write_text(f"{head}\nprocess {rank} ({os.getpid()} on {socket.gethostname()}) at {at}\n\n{stacks()}")
    temporary.replace(path)


def read(folder: Path) -> dict[int, Report]:
    """Returns the reports by process; none if there is no such folder."""
    found = {}
    for path in folder.glob("process-*.txt"):
        with contextlib.suppress(FileNotFoundError):  # just withdrawn
            found[int(path.stem.rpartition("-")[2])] = Report(**json.loads(path.read_text().partition("\n")[0]))
    return found


def withdraw(folder: Path, rank: int) -> None:
    """Removes the report of a process, and the folders if it was the last."""
    (folder / _NAME.format(rank)).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other reports are in them
        folder.rmdir()
        folder.parent.rmdir()


def blame(reports: Mapping[int, Report], identities: Sequence[Identity]) -> str:
    """Returns in words which process holds up the others, of those that `identities` counts."""
    silent = [rank for rank in range(len(identities)) if rank not in reports]
    if silent:
        return f"no answer from {named(silent, identities)}; {identities[silent[0]].state()}"
    # the data of a step comes before the step
    places = {rank: (report.step, report.phase != DATA) for rank, report in reports.items()}
    behind = [rank for rank, place in places.items() if place == min(places.values())]
    first = reports[behind[0]]
    if first.phase == DATA:
        found = f"waiting for the data of step {first.step}: {named(behind, identities)}"
        return found + "".join(_odd(rank, reports[rank], several=len(behind) > 1) for rank in behind[:_SHOWN])
    if len(behind) < len(reports):
        return f"still in step {first.step}, which the others have done: {named(behind, identities)}"
    busy = [rank for rank in behind if not reports[rank].waits]
    if busy and len(busy) < len(behind):
        return f"at work in step {first.step}, where the others wait: {named(busy, identities)}"
    if len(identities) == 1:
        return f"in step {first.step}: {named(behind, identities)}"
    return f"all processes are in step {first.step}, and wait for one another or for their devices"


def named(ranks: Sequence[int], identities: Sequence[Identity]) -> str:
    """Returns processes with their pids and hosts, the first eight of many."""
    shown = (f"process {rank} ({identities[rank].pid} on {identities[rank].host})" for rank in ranks[:_SHOWN])
    return ", ".join(shown) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _odd(rank: int, report: Report, *, several: bool) -> str:
    """Returns what is wrong with the processes that read a process's data, if the system knows."""
    whose = f" of process {rank}" if several else ""
    odd = {state: pids for state, pids in report.helpers.items() if state not in _USUAL}
    return "".join(f"; its child {pid}{whose} is {state}" for state, pids in odd.items() for pid in pids)


def end_stopped_helpers() -> None:
    """Kills the stopped processes that this one has started: the others end with it by themselves."""
    for pid in helpers().get(psutil.STATUS_STOPPED, []):
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()

"""Runs a function in processes of its own that may fail in any way without harm to this one.

Knows nothing of what is measured. Whatever happens here, Ctrl-C and SIGKILL included, no process stays behind:
a child leads a session of its own, which is killed when it is done with or when its parent is gone.
"""

from __future__ import annotations

import atexit
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from ijepa_scale import environment
from ijepa_scale.environment import Launch
from ijepa_scale.errors import UserError

GRACE_S = 3.0  # for the other processes to say why, when one has failed
_SPENT = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes this one is, and where it leaves what it knows."""

    rank: int
    size: int
    port: int
    folder: str

    @property
    def launch(self) -> Launch:
        """The same as a launcher would say it."""
        return Launch(
            rank=self.rank,
            world_size=self.size,
            local_rank=self.rank,
            local_world_size=self.size,
            address="127.0.0.1",
            port=self.port,
        )

    def note(self, **values: Any) -> None:
        """Leaves values for the parent, which finds them even when this process is killed; later ones are added."""
        path = Path(self.folder) / f"{self.rank}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps({**known, **values}))
        fresh.rename(path)


Function = Callable[[Any, Place], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a function ended in all its processes."""

    values: tuple[dict[str, Any], ...] = ()  # what each returned; empty where one has failed
    kind: str = "done"  # done | memory | signal | refused | error | time
    reason: str = ""  # of a failure, one line
    notes: dict[str, Any] = field(default_factory=dict)  # of process 0
    seconds: float = 0.0


class Children:
    """Starts functions in child processes. Their output goes into files in `logs`, where one is given."""

    def __init__(self, logs: Path | None = None) -> None:
        self._logs = logs
        # CUDA can't be forked, and asking whether it is there starts no context
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # imports torch once instead of once per child
            self._context.set_forkserver_preload(["ijepa_scale.tune.probe"])
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        self._started = 0

    def run(self, function: Function, argument: Any, *, processes: int = 1, limit_s: float) -> Outcome:
        """Returns how `function(argument, place)` ended in `processes` processes, at most `limit_s` seconds later.

        `function` is importable by name and `argument` picklable. What it returns is JSON's types.
        """
        self._started += 1
        folder = tempfile.mkdtemp(prefix="ijepa-tune-")
        port, begin = environment.free_port(), time.monotonic()
        children = []
        try:
            for rank in range(processes):
                place = Place(rank=rank, size=processes, port=port, folder=folder)
                log = str(self._logs / f"{self._started:03d}-{rank}.log") if self._logs else os.devnull
                child = self._context.Process(target=_child, args=(function, argument, place, log))
                children.append(child)
                child.start()
            in_time = _wait(children, begin + limit_s)
            seconds = time.monotonic() - begin
            codes = [child.exitcode for child in children]
            notes = [_read(Path(folder) / f"{rank}.json") for rank in range(processes)]
        finally:
            for child in children:
                _end(child)
            shutil.rmtree(folder, ignore_errors=True)
        return _outcome(codes, notes, in_time=in_time, limit_s=limit_s, seconds=seconds)


def _wait(children: list[Any], deadline: float) -> bool:
    """Waits for all children, or for the deadline, or for a moment after one has failed; returns if all ended."""
    running = {child.sentinel: child for child in children}
    while running:
        ready = connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        for sentinel in ready:
            child = running.pop(sentinel)
            child.join()
            if child.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return True


def _end(child: Any) -> None:
    """Kills what is left of a child and of what it has started."""
    if child.pid is None:
        return
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it is gone, or hasn't come to lead a session yet
    child.kill()
    child.join()


def _outcome(
    codes: list[int | None], notes: list[dict[str, Any]], *, in_time: bool, limit_s: float, seconds: float
) -> Outcome:
    """Returns what exit codes and notes say together: lack of memory first, as other failures follow from it."""
    first = notes[0]
    if in_time and all(code == 0 and "values" in note for code, note in zip(codes, notes, strict=True)):
        return Outcome(values=tuple(note["values"] for note in notes), notes=first, seconds=seconds)
    failures = [(note["kind"], note["reason"], note.get("phase")) for note in notes if "kind" in note]
    for code, note in zip(codes, notes, strict=True):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            guess = ": the system ran out of memory, or someone killed it" if name == "SIGKILL" else ""
            failures.append(("signal", f"killed by {name}{guess}", note.get("phase")))
        elif code not in (None, 0) and "kind" not in note:
            failures.append(("error", f"ended with exit code {code} and said nothing", note.get("phase")))
    if not failures:
        failures = [("time", f"took longer than {limit_s:.0f} s", first.get("phase"))]
    order = ("memory", "signal", "refused", "error", "time")
    kind, reason, phase = min(failures, key=lambda failure: order.index(failure[0]))
    return Outcome(kind=kind, reason=f"{reason} ({phase})" if phase else reason, notes=first, seconds=seconds)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _child(function: Function, argument: Any, place: Place, log: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a") as file:  # of this process and of all libraries in it
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if place.size > 1 and environment.threads() is None:  # as in training: PyTorch would give each all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // place.size))
    try:
        place.note(values=function(argument, place))
    except BaseException as error:
        traceback.print_exc()
        kind, reason = _classified(error)
        place.note(kind=kind, reason=reason)
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    if place.size == 1:  # with others, what is registered there may wait for them
        atexit._run_exitfuncs()  # unlinks torch.compile's semaphores, which would be told as leaked
    os._exit(0)  # taking process groups and DeepSpeed down takes seconds, and nothing is left to save


def _classified(error: BaseException) -> tuple[str, str]:
    """Returns the kind of an error and one line on it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or no_memory:
        return "memory", "out of memory"
    if isinstance(error, UserError):
        return "refused", line
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _SPENT):
        return "memory", "out of memory"
    return "error", f"{type(error).__name__}: {line}"


def _end_with_parent() -> None:
    """Kills this session when the process that asked for it is gone, killed ones included."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)

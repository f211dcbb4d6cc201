"""Runs a function in child processes, which may fail in any way without harming this one.

Whatever happens to this process, even Ctrl-C or SIGKILL, no child outlives it: each child leads a new session, which
is killed when the child has ended or its parent has. Knows nothing of what is measured.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
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
from ijepa_scale.registry import PLUGINS, load_plugin

logger = logging.getLogger(__name__)

GRACE_S = 3.0  # after one process has failed, the time for the others to report their reasons
KILLED_S = 10.0  # until a child that was killed must have ended
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """A child process's rank among `size` processes, and the folder in which it leaves notes for the parent."""

    rank: int
    size: int
    port: int
    folder: str

    @property
    def launch(self) -> Launch:
        """The same information as a launcher would provide it."""
        return Launch(
            rank=self.rank,
            world_size=self.size,
            local_rank=self.rank,
            local_world_size=self.size,
            address="127.0.0.1",
            port=self.port,
        )

    def note(self, **values: Any) -> None:
        """Adds values to the notes for the parent, which can read them even if this process is killed."""
        path = Path(self.folder) / f"{self.rank}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps({**known, **values}))
        new.rename(path)


Function = Callable[[Any, ProcessInfo], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a function in all its processes."""

    values: tuple[dict[str, Any], ...] = ()  # what each process returned; empty if one has failed
    kind: str = "done"  # done | memory | signal | refused | error | time
    reason: str = ""  # of a failure, in one line
    notes: dict[str, Any] = field(default_factory=dict)  # those of rank 0
    seconds: float = 0.0


class Children:
    """Runs functions in child processes. Their output goes into files in folder `logs`, if given."""

    def __init__(self, logs: Path | None = None) -> None:
        self._logs = logs
        # CUDA can't be forked; asking whether it is available creates no CUDA context
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # imports torch once instead of once per child
            self._context.set_forkserver_preload(["ijepa_scale.tune.probe"])
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        self._started = 0

    def run(self, function: Function, argument: Any, *, processes: int = 1, limit_s: float) -> Outcome:
        """Calls `function(argument, process)` in each of `processes` processes, for at most `limit_s` seconds.

        `function` must be importable by name and return values of JSON types; `argument` must be picklable.
        """
        self._started += 1
        folder = tempfile.mkdtemp(prefix="ijepa-tune-")
        port, begin = environment.free_port(), time.monotonic()
        children: list[Any] = []
        ended: set[Any] = set()
        try:
            for rank in range(processes):
                process = ProcessInfo(rank=rank, size=processes, port=port, folder=folder)
                log = str(self._logs / f"{self._started:03d}-{rank}.log") if self._logs else os.devnull
                child = self._context.Process(target=_child, args=(PLUGINS, function, argument, process, log))
                children.append(child)
                child.start()
            in_time = _wait(children, ended, begin + limit_s)
            seconds = time.monotonic() - begin
            codes = [child.exitcode for child in children]
            notes = [_read(Path(folder) / f"{rank}.json") for rank in range(processes)]
        finally:
            for child in children:
                if child not in ended:
                    _end(child)
            shutil.rmtree(folder, ignore_errors=True)
        return _outcome(codes, notes, in_time=in_time, limit_s=limit_s, seconds=seconds)


def _wait(children: list[Any], ended: set[Any], deadline: float) -> bool:
    """Waits until all children have ended or the deadline has passed; returns whether all have ended.

    Ends at once what those have started that have ended, and adds them to `ended`: the system may give their number to
    other processes afterwards. After one child has failed, waits at most `GRACE_S` for the others.
    """
    running = {child.sentinel: child for child in children}
    while running:
        ready = connection.wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        for sentinel in ready:
            child = running.pop(sentinel)
            _end(child)
            ended.add(child)
            if child.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return True


def _end(child: Any) -> None:
    """Kills a child and all processes that it has started. Call it once."""
    if child.pid is None:
        return
    # the number of one that has been waited for stays its group's while a helper lives: a process of that number is new
    if child.exitcode is None or not Path(f"/proc/{child.pid}").exists():
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has ended, or doesn't lead a session yet
    child.kill()
    child.join(KILLED_S)
    if child.exitcode is None:
        multiprocessing.process._children.discard(child)  # type: ignore[attr-defined]  # else Python's end waits for it
        logger.warning(
            "process %d hasn't ended %.0f s after it was killed, and may hold memory: it waits for a driver or a disk "
            "(state D in ps; dmesg says more)",
            child.pid,
            KILLED_S,
        )


def _outcome(
    codes: list[int | None], notes: list[dict[str, Any]], *, in_time: bool, limit_s: float, seconds: float
) -> Outcome:
    """Combines exit codes and notes into an outcome. Lack of memory comes first, because it causes other failures."""
    first = notes[0]
    if in_time and all(code == 0 and "values" in note for code, note in zip(codes, notes, strict=True)):
        return Outcome(values=tuple(note["values"] for note in notes), notes=first, seconds=seconds)
    failures = [(note["kind"], note["reason"], note.get("phase")) for note in notes if "kind" in note]
    for code, note in zip(codes, notes, strict=True):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            guess = ": the system ran out of memory, or a user killed it" if name == "SIGKILL" else ""
            failures.append(("signal", f"killed by {name}{guess}", note.get("phase")))
        elif code not in (None, 0) and "kind" not in note:
            failures.append(("error", f"ended with exit code {code} without a message", note.get("phase")))
    if not failures:
        failures = [("time", f"took longer than {limit_s:.0f} s", first.get("phase"))]
    order = ("memory", "signal", "refused", "error", "time")
    kind, reason, phase = min(failures, key=lambda failure: order.index(failure[0]))
    return Outcome(kind=kind, reason=f"{reason} ({phase})" if phase else reason, notes=first, seconds=seconds)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _child(plugins: list[str], function: Function, argument: Any, process: ProcessInfo, log: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a") as file:  # redirects the output of this process and of all libraries in it
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if process.size > 1 and environment.threads() is None:  # as in training; else each process would use all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // process.size))
    try:
        for module in plugins:
            load_plugin(module)
        process.note(values=function(argument, process))
    except BaseException as error:
        traceback.print_exc()
        kind, reason = _classified(error)
        process.note(kind=kind, reason=reason)
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    if process.size == 1:  # with several processes, an exit function may wait for the others
        atexit._run_exitfuncs()  # unlinks torch.compile's semaphores, which would be reported as leaked
    os._exit(0)  # shutting down process groups and DeepSpeed takes seconds, and nothing is left to save


def _classified(error: BaseException) -> tuple[str, str]:
    """Returns the kind of an error and a one-line reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or no_memory:
        return "memory", "out of memory"
    if isinstance(error, UserError):
        return "refused", line
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _NO_MEMORY):
        return "memory", "out of memory"
    return "error", f"{type(error).__name__}: {line}"


def _end_with_parent() -> None:
    """Kills this session when the process that requested it has ended, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)

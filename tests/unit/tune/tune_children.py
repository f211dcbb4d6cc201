"""Functions for the tests to run in child processes, which must be able to import them by name."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.errors import ConfigError
from ijepa_scale.tune.children import Children, ProcessInfo


def answer(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    return {"argument": argument, "rank": process.rank, "size": process.size}


def kill_itself(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    process.note(phase="in the first steps", rate=3)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def allocate_too_much(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    process.note(phase="in the step with the longest masks")
    room = 1 << 30  # bytes of address space, on top of what this process uses already
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))
    return {"sum": float(torch.ones(4 * room).sum())}


def refuse(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    raise ConfigError("engine.strategy is odd\nand more")


def break_down(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    raise KeyError("nothing there")


def leave(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    os._exit(7)


def die_on_process_1(argument: Any, process: ProcessInfo) -> dict[str, Any]:
    if process.rank == 1:
        raise MemoryError
    time.sleep(600)  # as if it waited in a collective
    return {}


def sleep_with_a_child(pids: str, process: ProcessInfo) -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    new = Path(pids).with_suffix(".tmp")
    new.write_text(f"{os.getpid()} {child.pid}")
    new.rename(pids)
    time.sleep(600)
    return {}


def leave_a_child(folder: str, process: ProcessInfo) -> dict[str, Any]:
    """Process 0 ends, and leaves a process behind; process 1 ends once that one has, or hangs."""
    pids = Path(folder) / "pids"
    if process.rank == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        new = pids.with_suffix(".tmp")
        new.write_text(f"{os.getpid()} {child.pid}")
        new.rename(pids)
        return {}
    while not pids.exists():
        time.sleep(0.05)
    while Path(f"/proc/{pids.read_text().split()[1]}").exists():
        time.sleep(0.05)
    return {}


if __name__ == "__main__":  # the parent process, which the test kills or interrupts
    Children().run(sleep_with_a_child, sys.argv[1], limit_s=600)

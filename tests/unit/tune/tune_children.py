"""What the tests have child processes do; importable by name, as a child needs it."""

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
from ijepa_scale.tune.children import Children, Place


def answer(argument: Any, place: Place) -> dict[str, Any]:
    return {"argument": argument, "rank": place.rank, "size": place.size}


def kill_itself(argument: Any, place: Place) -> dict[str, Any]:
    place.note(phase="in the first steps", rate=3)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def allocate_too_much(argument: Any, place: Place) -> dict[str, Any]:
    place.note(phase="in the step with the longest masks")
    room = 1 << 30  # of address space, beyond what this process has already
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))
    return {"sum": float(torch.ones(4 * room).sum())}


def refuse(argument: Any, place: Place) -> dict[str, Any]:
    raise ConfigError("engine.strategy is odd\nand more")


def break_down(argument: Any, place: Place) -> dict[str, Any]:
    raise KeyError("nothing there")


def leave(argument: Any, place: Place) -> dict[str, Any]:
    os._exit(7)


def die_on_process_1(argument: Any, place: Place) -> dict[str, Any]:
    if place.rank == 1:
        raise MemoryError
    time.sleep(600)  # as in a collective
    return {}


def sleep_with_a_child(pids: str, place: Place) -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    fresh = Path(pids).with_suffix(".tmp")
    fresh.write_text(f"{os.getpid()} {child.pid}")
    fresh.rename(pids)
    time.sleep(600)
    return {}


if __name__ == "__main__":  # a parent that is killed or interrupted
    Children().run(sleep_with_a_child, sys.argv[1], limit_s=600)

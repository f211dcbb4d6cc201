"""Shared by all benchmarks: the description of the machine, timing, percentiles, tables and JSONL rows."""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from ijepa_kernels.linear import linear
from ijepa_scale import environment

Row = dict[str, Any]
SKIPPED = "SKIPPED"  # first word of the line that `report_skip` prints


@functools.lru_cache
def about() -> dict[str, Any]:
    """Returns date, revision, device and versions, with which each row begins; looked up once per process."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "revision": environment.git_revision(str(Path(__file__).parent)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {_processor()}",
        "torch": torch.__version__,
    }


def append(path: Path | None, row: dict[str, Any]) -> None:
    """Appends a row to the JSONL file `path`; does nothing if it is None.

    The row is one write, handed to the system before this returns. A process that is killed afterwards loses nothing.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps({**about(), **row}) + "\n").encode())


def record(path: Path | None, rows: Iterable[Row]) -> list[Row]:
    """Returns the rows, after appending each to the JSONL file `path` as soon as it is measured.

    A benchmark yields its rows and leaves the writing to this function. So a killed benchmark keeps what it measured.
    """
    found = []
    for row in rows:
        append(path, row)
        found.append(row)
    return found


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSONL file; none if it doesn't exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report_skip(what: str, reason: str) -> None:
    """Prints that a part of a benchmark can't run here, as the suite reads it (`benchmarks.suite`)."""
    print(f"{SKIPPED} {what}: {' '.join(reason.split())}", flush=True)


def require_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program with a message if the device isn't there."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; give --device cpu")


def percentiles(values: list[float]) -> dict[str, float]:
    """Returns the 20th, 50th and 80th percentile."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {"p20": float(low), "p50": float(middle), "p80": float(high)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_turns(
    works: dict[str, Callable[[int], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Returns the seconds of each work in each round. The works take turns, in reverse order every second round.

    The first round warms up and isn't counted. A work is called with the number of the round, from 0.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in list(works) if turn % 2 == 0 else reversed(works):
            begin = clock()
            works[name](turn)
            spent = clock() - begin
            if turn:
                found[name].append(spent)
    return found


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Returns the percentiles of slow / fast, round by round."""
    return percentiles([theirs / ours for theirs, ours in zip(slow, fast, strict=True)])


def product_flops(dtype: torch.dtype, rounds: int = 9, size: int = 1024) -> float:
    """Returns the highest FLOP/s of matrix products on the CPU, in CPU time; a step's share refers to this peak."""
    values, weight = (
        torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1)
    )
    seconds = in_turns({"product": lambda _: linear(values, weight)}, rounds)["product"]
    return 2 * size**3 / min(seconds)


def resident_growth(work: Callable[[], Any]) -> int | None:
    """Returns the bytes by which this process's memory grows during `work`; None if the kernel doesn't report it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
        before = _status_bytes("VmRSS")
        work()
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def draw_bars(values: dict[str, float], path: Path, label: str) -> None:
    """Draws a horizontal bar for each value; bars with "baseline" in their name are grey."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.35 * len(values)), layout="constrained")
    axes.barh(list(values), list(values.values()), color=["#888" if "baseline" in n else "#1f77b4" for n in values])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _processor() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

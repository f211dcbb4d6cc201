"""Question: which of our kernels beat plain PyTorch and torch.compile, and how close are they to the device's limit?

python -m benchmarks.kernels [--device cuda] [--only target_loss ...] [--quick] [--to benchmarks/results/kernels.jsonl]

All implementations of a kernel take turns in one run. On a GPU they are timed by events, and the L2 cache is
overwritten before each call. The share compares the measured time with the least time that the device needs: the bytes
that must move at the speed of a large copy measured in the same run, or the FLOPs at the data sheet's peak (bf16; twice
that in fp8), whichever takes longer. The end of the report lists our kernels that are slower than torch.compile, and
the implementations that this device can't run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, percentiles, record, table
from benchmarks.kernel_cases import KERNELS, Case, Setting, Work, settings
from ijepa_scale.planning.hardware import peak_flops

FLUSHED = 256 << 20  # bytes, several times the largest L2 cache
ROUNDS = {"cuda": 50, "cpu": 10}
COPIED = {"cuda": 1 << 30, "cpu": 64 << 20}  # size of the copy that measures the bandwidth, in bytes


class Clock:
    """Times calls in milliseconds: by events on a GPU, by wall time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if self.on_gpu else None

    def __call__(self, work: Work) -> float:
        """Returns the milliseconds of one call."""
        if self.flushed is None:
            begin = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - begin)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.flushed.zero_()
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1])


def copy_bandwidth(device: torch.device, clock: Clock, rounds: int) -> float:
    """Returns the bytes per second, reads plus writes, of a large copy on the device."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = [clock(lambda: target.copy_(source)) for _ in range(rounds + 1)][1:]
    return 2e3 * source.numel() / percentiles(spent)["p50"]


def least_ms(case: Case, bandwidth: float, peak: float | None) -> float:
    """Returns the least milliseconds that the device needs; by bandwidth alone if its peak FLOP/s are unknown."""
    moving = (case.cost["read_bytes"] + case.cost["written_bytes"]) / bandwidth
    computing = 0.0 if peak is None else case.cost["flops"] / (peak * (2 if case.fp8 else 1))
    return 1e3 * max(moving, computing)


def measure(case: Case, at: Setting, clock: Clock, rounds: int) -> dict[str, Any]:
    """Returns the row of a case: milliseconds and peak bytes of each implementation, and our speed-up over compiled."""
    spent: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    missing = dict(case.missing)
    for name, work in case.ways.items():
        if clock.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(3):
                work()  # compiles and warms up
        except RuntimeError as error:
            if name not in ("flash", "efficient", "cudnn", "math"):  # a forced backend may not support the shape
                raise
            missing[name] = str(error).splitlines()[0]
            continue
        spent[name] = []
        if clock.on_gpu:
            peaks[name] = torch.cuda.max_memory_allocated()
    for _ in range(rounds):
        for name, values in spent.items():
            values.append(clock(case.ways[name]))
    ways = {name: percentiles(values) for name, values in spent.items()}
    ours = ways.get(case.ours)
    return {
        "benchmark": "kernels", "on": str(at.device), "kernel": case.kernel, "size": at.name, "shape": case.shape,
        "unit": "ms", "ways": ways, "ours": case.ours, "peak_bytes": peaks, "missing": missing, "cost": case.cost,
        "times_compiled": None if ours is None else ways["compiled"]["p50"] / ours["p50"],
    }  # fmt: skip


def run(device: torch.device, *, quick: bool = False, only: list[str] | None = None) -> Iterator[Row]:
    """Yields a row for each kernel and size; `quick` uses small sizes and few rounds."""
    clock, rounds = Clock(device), 5 if quick else ROUNDS[device.type]
    bandwidth = copy_bandwidth(device, clock, rounds)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    for at in settings(device, quick):
        for name, cases in KERNELS.items():
            if only and name not in only:
                continue
            for case in cases(at):
                row = measure(case, at, clock, rounds)
                least = least_ms(case, bandwidth, peak)
                shares = {way: least / values["p50"] for way, values in row["ways"].items()}
                yield {**row, "copy_bytes_per_s": bandwidth, "peak_flops": peak, "shares": shares}


def report(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a table, what this device couldn't run, and our kernels that lose to torch.compile."""
    lines = [
        [
            row["kernel"], f"{row['size']}: {row['shape']}", f"{way} (ours)" if way == row["ours"] else way,
            " - ".join(f"{values[p]:.3g}" for p in ("p20", "p50", "p80")), f"{100 * row['shares'][way]:.0f} %",
            f"{row['ways']['compiled']['p50'] / values['p50']:.2f}",
        ]
        for row in rows for way, values in row["ways"].items()
    ]  # fmt: skip
    header = ["kernel", "size", "implementation", "ms, 20-50-80 %", "share of the device", "times torch.compile"]
    text = [table(header, lines), ""]
    for row in rows:
        text += [f"{row['kernel']}, {row['size']}: no {way}: {why}" for way, why in row["missing"].items()]
    for row in rows:
        ratio, name = row["times_compiled"], f"{row['kernel']}, {row['size']}: {row['shape']}"
        if ratio is None:
            text.append(f"{name}: no verdict, ours doesn't run on {row['on']}")
        elif ratio < 1:
            text.append(f"{name}: LOSES to torch.compile, {ratio:.2f} times its speed; leave it off")
    return "\n".join(text)


def main() -> None:
    """Runs the benchmark, prints its table and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), help="names of kernels (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    print(report(record(options.to, run(torch.device(options.device), quick=options.quick, only=options.only))))


if __name__ == "__main__":
    main()

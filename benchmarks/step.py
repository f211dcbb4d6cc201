"""Question: how much faster is our training step than the published recipe in eager PyTorch, and how close to the peak?

python -m benchmarks.step --model vit_small --patch-size 16 --image-size 224 --batch 8 --precision fp32,bf16
    [--context truncate|packed] [--compile] [--checkpointing M] [--device cuda] [--target bf16|fp8] [--steps N]
    [--variant masks.context=packed ...] [--part step|update|all] [--trace DIR] [--to FILE] [--plot FILE]
    [section.key=value ...]

All sides use the same synthetic images on the device, masks and starting weights. On the CPU they take turns on one
thread, and CPU time is compared pair by pair. On a GPU each side has the device to itself, in one run, timed by events
after a warm-up. Masks are drawn anew each step, so lengths vary. The share of the peak refers to the data sheet's bf16
peak on a GPU, and on the CPU to the fastest matrix products of that precision measured in the same run. FLOPs are those
of the published recipe for all sides. No baseline does the same work as packed masks, or as several mask groups in a
batch: compare their share of the peak with that of truncated masks. Exits with 1 if losses disagree or a side failed.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    append,
    draw_bars,
    in_turns,
    percentiles,
    product_flops,
    ratios,
    record,
    resident_growth,
    table,
)
from benchmarks.synthetic import (
    Baseline,
    Draws,
    Ours,
    add_model_flags,
    configured,
    images_for,
    settings_of,
    start,
)
from benchmarks.update import measure_update, report_update
from ijepa_scale.config import PretrainConfig
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.planning.hardware import peak_flops

BASELINE, OURS = "eager baseline", "ours"
WARM_UP = {"cpu": 1, "cuda": 6}  # steps; on the CPU this is the warm-up round of in_turns
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}  # largest difference of losses that rounding explains, in bf16 over all blocks


class Measured:
    """The measurements of one side."""

    def __init__(self, name: str, config: PretrainConfig, draws: Draws) -> None:
        self.name, self.config, self.draws = name, config, draws
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.peak_bytes: int | None = None
        self.failed: str | None = None


def build(name: str, config: PretrainConfig, module: JEPA, images: Tensor, draws: Draws) -> Callable[[int], Tensor]:
    """Returns the training step of a side."""
    return Baseline(config, module, images, draws) if name == BASELINE else Ours(config, module, images)


def on_cpu(sides: list[Measured], module: JEPA, images: Tensor, steps: int) -> None:
    """Measures all sides, which take turns, by CPU time."""
    works = {side.name: build(side.name, side.config, module, images, side.draws) for side in sides}
    losses: dict[str, list[Tensor]] = {name: [] for name in works}

    def recorded(name: str) -> Callable[[int], None]:
        return lambda step: losses[name].append(works[name](step))

    found = in_turns({name: recorded(name) for name in works}, steps)
    for side in sides:
        side.seconds = found[side.name]
        side.losses = [float(loss) for loss in losses[side.name]]
        side.steps = list(range(1, steps + 1))
        side.peak_bytes = resident_growth(lambda name=side.name: works[name](steps + 1))


def on_gpu(side: Measured, module: JEPA, images: Tensor, steps: int) -> None:
    """Measures one side by events, with the GPU and its allocator to itself."""
    torch.compiler.reset()  # graphs of the previous side would count towards torch.compile's limit
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        work = build(side.name, side.config, module, images, side.draws)
        first = WARM_UP["cuda"]
        losses = [work(step) for step in range(first)]
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for turn in range(steps):
            losses.append(work(first + turn))
            events[turn + 1].record()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        side.failed = f"out of memory: {str(error).splitlines()[0][:200]}"
        return
    side.seconds = [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]
    side.losses = [float(loss) for loss in losses]
    side.steps = list(range(first, first + steps))
    side.peak_bytes = torch.cuda.max_memory_allocated()


def sides_of(config: PretrainConfig, options: argparse.Namespace, precision: str) -> list[Measured]:
    """Returns the sides to measure: the baseline if masks are truncated, ours, and variants of ours."""
    device, last = torch.device(options.device), WARM_UP[options.device] + options.steps + 1
    settings = settings_of(options, precision)
    configs = {} if config.masks.context == "packed" or options.no_baseline else {BASELINE: config}
    configs[OURS] = config
    for variant in options.variant:
        configs[f"{OURS}, {variant}"] = configured([*settings, *variant.split()])
    draws: dict[str, Draws] = {}
    for each in configs.values():
        if repr(each.masks) not in draws:
            draws[repr(each.masks)] = Draws(each, device)
            for step in range(last):  # draw all masks before timing starts
                draws[repr(each.masks)](step)
    return [Measured(name, each, draws[repr(each.masks)]) for name, each in configs.items()]


def share_of(side: Measured, peak: float | None) -> float | None:
    """Returns the FLOPs of the measured steps divided by those that the peak allows in the same time."""
    if peak is None or not side.seconds:
        return None
    return sum(side.draws.flops(step) for step in side.steps) / (sum(side.seconds) * peak)


def row_of(side: Measured, sides: list[Measured], peak: float | None) -> dict[str, Any]:
    """Returns the row of a side."""
    config, by_name = side.config, {each.name: each for each in sides}
    about = {
        "benchmark": "step",
        "side": side.name,
        "model": config.model.name,
        "image_size": config.model.image_size[0],
        "patch_size": config.model.patch_size,
        "batch": config.data.batch_size,
        "precision": config.engine.precision,
        "context": config.masks.context,
        "groups": -(-(config.data.batch_size or 0) // config.masks.group_size),
        "compile": config.engine.compile and side.name != BASELINE,
        "checkpointing": "none" if side.name == BASELINE else config.engine.checkpointing,
    }
    if side.failed is None and not all(map(math.isfinite, side.losses)):
        side.failed = f"a loss isn't finite: {side.losses}"
    if side.failed is not None:
        return {**about, "failed": side.failed}
    milliseconds = percentiles([1e3 * value for value in side.seconds])
    row = {
        **about,
        "unit": "ms per step",
        **milliseconds,
        "images_per_s": 1e3 * (config.data.batch_size or 0) / milliseconds["p50"],
        "share_of_peak": share_of(side, peak),
        "peak": peak,
        "peak_bytes": side.peak_bytes,
        "last_loss": side.losses[-1],
    }
    for other, key in ((BASELINE, "times_baseline"), (OURS, "times_ours")):
        if other in by_name and by_name[other].seconds and other != side.name:
            row[key] = ratios(by_name[other].seconds, side.seconds)
            if config.masks == by_name[other].config.masks:
                pairs = zip(side.losses, by_name[other].losses, strict=True)
                row[f"loss_difference_{key}"] = max(abs(a - b) for a, b in pairs)
    if OURS in by_name and share_of(by_name[OURS], peak):
        row["share_times_ours"] = (share_of(side, peak) or 0.0) / (share_of(by_name[OURS], peak) or 1.0)
    if BASELINE in by_name and config.masks != by_name[BASELINE].config.masks:
        row.pop("times_baseline", None)  # other masks are other work
    return row


def disagrees(row: dict[str, Any]) -> bool:
    """Returns whether a side's losses differ from the baseline's by more than rounding; those of an fp8 target may."""
    difference = row.get("loss_difference_times_baseline")
    return difference is not None and "fp8" not in row["side"] and difference > AGREEMENT[row["precision"]]


def report(rows: list[dict[str, Any]], device: str) -> str:
    """Returns the results as a Markdown table."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["side"], row["failed"], "", "", "", "", ""])
            continue
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        times = row.get("times_baseline")
        difference = row.get("loss_difference_times_baseline")
        lines.append(
            [
                row["side"],
                f"{row['p20']:.1f} - {row['p50']:.1f} - {row['p80']:.1f}",
                f"{row['images_per_s']:.2f}",
                share,
                memory,
                "" if times is None else f"{times['p20']:.2f} - {times['p50']:.2f} - {times['p80']:.2f}",
                "" if difference is None else f"{difference:.1e}",
            ]
        )
    clock = "CPU ms" if device == "cpu" else "ms"
    memory = "GiB, growth in a step" if device == "cpu" else "peak GiB"
    header = ["side", f"{clock} per step", "images/s", "share of peak", memory, "times the baseline", "loss difference"]
    return table(header, lines)


def trace(config: PretrainConfig, options: argparse.Namespace, folder: Path) -> None:
    """Writes a profiler trace of three steps of each side, and prints where the time goes."""
    folder.mkdir(parents=True, exist_ok=True)
    module, device = start(config), torch.device(options.device)
    images = images_for(config, options.batch, device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for side in sides_of(config, options, config.engine.precision):
        work = build(side.name, side.config, module, images, side.draws)
        for step in range(WARM_UP[device.type]):
            work(step)
        with torch.profiler.profile(activities=activities) as profile:
            for step in range(3):
                float(work(WARM_UP[device.type] + step))
        name = side.name.replace(" ", "_").replace(",", "")
        profile.export_chrome_trace(str(folder / f"{name}-{config.engine.precision}.json"))
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"\n{side.name}, three steps:\n{profile.key_averages().table(sort_by=order, row_limit=12)}")


def measure(config: PretrainConfig, options: argparse.Namespace, precision: str) -> tuple[list[dict[str, Any]], bool]:
    """Measures one precision, prints tables and appends rows; returns the rows and whether all sides ran and agree."""
    device = torch.device(options.device)
    module, images = start(config), images_for(config, options.batch, device)
    rows, well = [], True
    if options.part in ("all", "step"):
        peak = product_flops(DTYPES[precision]) if device.type == "cpu" else peak_flops(torch.cuda.get_device_name())
        sides = sides_of(config, options, precision)
        if device.type == "cpu":
            on_cpu(sides, module, images, options.steps)
        for side in sides:
            if device.type == "cuda":
                on_gpu(side, module, images, options.steps)
            rows.append(row_of(side, sides, peak))
            append(options.to, rows[-1])
        print(f"\n{options.model}/{options.patch_size} at {options.image_size}, {options.batch} images, {precision}\n")
        print(report(rows, device.type), flush=True)
        well = not any("failed" in row or disagrees(row) for row in rows)
        if any(disagrees(row) for row in rows):
            print(f"losses disagree by more than {AGREEMENT[precision]:g}")
    if options.part in ("all", "update"):
        updates = record(options.to, measure_update(config, module, device, options.steps))
        print(f"\n{report_update(updates)}", flush=True)
    return rows, well


def main() -> None:
    """Runs the benchmark, prints its tables, and writes the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp32,bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    parser.add_argument("--part", choices=("all", "step", "update"), default="all")
    parser.add_argument("--no-baseline", action="store_true", help="measure ours alone")
    parser.add_argument(
        "--variant", action="append", default=[], help="overrides of another side to measure, in one argument"
    )
    parser.add_argument("--trace", type=Path, help="folder for profiler traces; measures nothing else")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_intermixed_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    found, well = {}, True
    for precision in options.precision.split(","):
        config = configured(settings_of(options, precision))
        if options.trace:
            trace(config, options, options.trace)
            continue
        rows, fine = measure(config, options, precision)
        well &= fine
        found.update({f"{row['side']}, {precision}": row["images_per_s"] for row in rows if "failed" not in row})
    if options.plot and found:
        title = f"{options.model}/{options.patch_size} at {options.image_size}, {options.batch} images"
        draw_bars(found, options.plot, f"images per second, {title}")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()

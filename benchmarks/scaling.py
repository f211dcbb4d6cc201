"""Question: how does each engine scale with the number of processes, and how many bytes does each process send?

python -m benchmarks.scaling [--processes 1 2 4] [--engines ddp fsdp2 zero1 ...] [--device cuda] [--to FILE]
    [--plot FILE] [section.key=value ...]

Every process has its own batch (weak scaling). The baseline runs in DDP. One step counts the collectives that PyTorch
dispatches and converts them to the bytes that a ring sends per process; the report compares these with the planner's
bytes. Uses gloo and a small model on the CPU, and NCCL with one GPU per process. Efficiency is images per second
divided by those of the same number of single processes. If there are more processes than cores, they share the cores;
then images per CPU-second shows what an engine itself costs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import append, draw_bars, percentiles, table
from benchmarks.synthetic import Baseline, Draws, Ours, add_model_flags, configured, images_for, settings_of, start
from ijepa_scale.config import PretrainConfig
from ijepa_scale.engine.ds_config import load_ds_config
from ijepa_scale.engine.world import World
from ijepa_scale.planning.communication import transfers
from ijepa_scale.planning.spread import Spread, ZeroBuckets

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
BASELINE = "eager baseline, ddp"
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SMALL = ["model.width=96", "model.depth=4", "model.heads=3", "model.predictor_width=48", "model.predictor_depth=2",
         "masks.min_keep=3"]  # fmt: skip
SHARES = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "reduce": 1.0, "alltoall": 1.0}
# the argument of a collective that holds all of its bytes (the gathered or scattered tensors); 0 for the others
WHOLE = {"reduce_scatter": 1}
COUNTED = 2  # the step whose collectives are counted; DDP rebuilds its buckets in the step before


class WireBytes(TorchDispatchMode):
    """Counts the collectives dispatched inside it, including those from hooks in backward."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self._processes = processes
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts it if it is a collective."""
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname.strip("_")
            kind = next((kind for kind in sorted(SHARES, key=len, reverse=True) if name.startswith(kind)), None)
            if kind is None and name.startswith("all_"):
                kind = next(kind for kind in SHARES if name.replace("_", "").startswith(kind))
            if kind is not None:
                whole = sum(t.numel() * t.element_size() for t in _tensors(args[WHOLE.get(kind, 0)]))
                self.bytes[kind] += round(SHARES[kind] * whole * (self._processes - 1) / self._processes)
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    """Returns all tensors in nested lists or tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def engine_settings(name: str) -> list[str]:
    """Returns the overrides that select an engine."""
    if name.startswith("zero"):
        return ["engine.strategy=deepspeed", f"engine.ds_config={DS_CONFIGS / name}.json"]
    return [f"engine.strategy={name}"]


def train(world: World, name: str, settings: list[str], steps: int) -> dict[str, Any]:
    """Returns what one process measured: seconds of each of `steps` steps, CPU seconds, bytes and calls per step."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    config = configured(settings)
    count = (config.data.batch_size or 0) // world.size
    images = images_for(config, count, world.device, first=world.rank * count)
    work = _work(world, name, config, images)
    for step in range(COUNTED):
        work(step)
    with WireBytes(world.size) as wire:
        loss = work(COUNTED)
    seconds = []
    _wait(world)
    cpu = time.process_time()
    for step in range(COUNTED + 1, COUNTED + 1 + steps):
        begin = time.perf_counter()
        work(step)
        _wait(world)
        seconds.append(time.perf_counter() - begin)
    cpu = time.process_time() - cpu
    mean = float(world.mean(loss.detach().clone().to(world.device)))
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    return {
        "seconds": seconds, "cpu_s": cpu, "bytes": dict(wire.bytes), "calls": dict(wire.calls), "loss": mean,
        "peak_bytes": peak,
    }  # fmt: skip


def _work(world: World, name: str, config: PretrainConfig, images: torch.Tensor) -> Any:
    if name != BASELINE:
        return Ours(config, start(config), images, world=world)
    draws = Draws(config, world.device, rank=world.rank, world=world.size)
    return Baseline(config, start(config), images, draws, wrap=DistributedDataParallel)


def _wait(world: World) -> None:
    """Waits for the device and for all other processes."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def planned_bytes(name: str, config: PretrainConfig, processes: int) -> float | None:
    """Returns the bytes per process and step that the planner expects; None for the baseline."""
    if name == BASELINE:
        return None
    zero = ZeroBuckets()
    if config.engine.ds_config is not None:
        zero = ZeroBuckets.of(load_ds_config(config.engine.ds_config)["zero_optimization"])
    spread = Spread(strategy=name, world=processes, precision=config.engine.precision, zero=zero)
    return sum(transfer.bytes for transfer in transfers(config.model, spread))


def measure(name: str, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of an engine on this many processes."""
    from tests.distributed.harness import run

    precision = "bf16" if options.device == "cuda" else "fp32"
    small = SMALL if options.device == "cpu" else []
    engine = engine_settings("ddp" if name == BASELINE else name)
    flags = argparse.Namespace(**{**vars(options), "overrides": []})
    settings = [*settings_of(flags, precision), f"data.batch_size={options.batch * processes}", *small, *engine]
    settings += options.overrides
    found = run(train, processes, name, settings, options.steps, device=options.device)
    seconds = [max(each) for each in zip(*(one["seconds"] for one in found), strict=True)]
    images = options.batch * processes
    return {
        "benchmark": "scaling",
        "engine": name,
        "processes": processes,
        "cores": os.cpu_count(),
        "batch_per_process": options.batch,
        "precision": precision,
        "unit": "images/s",
        **percentiles([images / value for value in seconds]),
        "images_per_cpu_s": images * options.steps / sum(one["cpu_s"] for one in found),
        "bytes_per_step": sum(found[0]["bytes"].values()),
        "bytes": found[0]["bytes"],
        "calls": found[0]["calls"],
        "planned_bytes": planned_bytes(name, configured(settings), processes),
        "peak_bytes": found[0]["peak_bytes"],
        "loss": found[0]["loss"],
    }


def report(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    lines = []
    for row in rows:
        planned = "" if row["planned_bytes"] is None else f"{row['planned_bytes'] / 1e6:.2f}"
        calls = ", ".join(f"{count} {kind}" for kind, count in sorted(row["calls"].items()))
        lines.append(
            [
                row["engine"],
                str(row["processes"]),
                f"{row['p50']:.2f}",
                f"{row['efficiency']:.0%}" if row["efficiency"] else "",
                f"{row['cpu_efficiency']:.0%}" if row["cpu_efficiency"] else "",
                f"{row['bytes_per_step'] / 1e6:.2f}",
                planned,
                calls,
            ]
        )
    header = ["engine", "processes", "images/s", "efficiency", "images per CPU-second, relative to one process",
              "MB sent per process and step", "planned", "collectives per step"]  # fmt: skip
    return table(header, lines)


def main() -> None:
    """Runs the benchmark, prints its table, and writes the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(model="vit_tiny", image_size=64, patch_size=8, batch=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in (BASELINE, *options.engines):
        alone: dict[str, Any] | None = None
        for processes in sorted(options.processes):
            row = measure(name, processes, options)
            alone = row if processes == 1 else alone
            row["efficiency"] = None if alone is None else row["p50"] / (processes * alone["p50"])
            row["cpu_efficiency"] = None if alone is None else row["images_per_cpu_s"] / alone["images_per_cpu_s"]
            rows.append(row)
            append(options.to, row)
    print(f"{os.cpu_count()} cores, {options.batch} images per process\n\n{report(rows)}")
    if options.plot:
        bars = {f"{row['engine']} x{row['processes']}": row["p50"] for row in rows}
        draw_bars(bars, options.plot, "images per second, all processes")


if __name__ == "__main__":
    main()

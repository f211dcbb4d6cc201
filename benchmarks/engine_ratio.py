"""Question: how do the speeds of ZeRO-3, FSDP2 and DDP on the same work relate?

python -m benchmarks.engine_ratio [--rounds 7] [--steps 6] [--processes 2] [--device cuda]
    [--engines fsdp2 zero3] [--to FILE] [section.key=value ...]

In each round each engine trains the same model on the same images and masks, in processes of its own; engines take
turns, in reverse order every second round. The first round warms up. The table has the 20th, 50th and 80th percentile
of DDP's seconds divided by an engine's, round by round: wall clock, and CPU time of all processes. It also says how far
losses differ, since the work must be the same. gloo and a small model on the CPU; NCCL, bf16 and a GPU per process on
CUDA.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import append, ratios, table
from benchmarks.scaling import SMALL, engine_settings, train
from benchmarks.synthetic import add_model_flags, settings_of

ENGINES = {  # name -> engine of `benchmarks.scaling`, further settings
    "ddp": ("ddp", []),
    "fsdp2": ("fsdp2", []),
    "fsdp2 reshard": ("fsdp2", ["engine.reshard_after_forward=true"]),
    "zero1": ("zero1", []),
    "zero3": ("zero3", []),
    "zero3 gathers again": ("zero3_small", []),
}
SAME = 1e-4  # largest difference of a loss of about 0.4, in fp32, that is the same work
SAME_BF16 = 2e-2


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns what one round of an engine took: wall and CPU seconds of a step, and its loss."""
    from tests.distributed.harness import run

    kind, further = ENGINES[name]
    precision = "bf16" if options.device == "cuda" else "fp32"
    flags = argparse.Namespace(**{**vars(options), "overrides": []})
    settings = [*settings_of(flags, precision), f"data.batch_size={options.batch * options.processes}"]
    settings += [*(SMALL if options.device == "cpu" else []), *engine_settings(kind), *further, *options.overrides]
    found = run(train, options.processes, kind, settings, options.steps, device=options.device)
    seconds = [max(each) for each in zip(*(one["seconds"] for one in found), strict=True)]
    cpu = sum(one["cpu_s"] for one in found) / options.steps
    return {"wall_s": statistics.median(seconds), "cpu_s": cpu, "loss": found[0]["loss"]}


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each engine, with its speed relative to DDP's.

    Raises:
        ValueError: the losses of two engines differ, so that their work isn't the same.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ("ddp", *options.engines)}
    for turn in range(options.rounds + 1):
        for name in list(rounds) if turn % 2 == 0 else reversed(rounds):
            found = measure(name, options)
            if turn:
                rounds[name].append(found)
    rows = []
    for name, mine in rounds.items():
        apart = max(abs(one["loss"] - base["loss"]) for one, base in zip(mine, rounds["ddp"], strict=True))
        if apart > (SAME if options.device == "cpu" else SAME_BF16):
            raise ValueError(f"the losses of {name} and ddp differ by {apart:.1e}: they don't do the same work")
        rows.append(
            {
                "benchmark": "engine_ratio",
                "engine": name,
                "processes": options.processes,
                "cores": os.cpu_count(),
                "batch_per_process": options.batch,
                "precision": "bf16" if options.device == "cuda" else "fp32",
                "overrides": options.overrides,
                "rounds": options.rounds,
                "steps": options.steps,
                "unit": "times DDP's speed",
                **{
                    f"{clock}_speed": ratios(
                        [base[f"{clock}_s"] for base in rounds["ddp"]], [one[f"{clock}_s"] for one in mine]
                    )
                    for clock in ("wall", "cpu")
                },
                **{
                    f"{clock}_ms": 1e3 * statistics.median(one[f"{clock}_s"] for one in mine)
                    for clock in ("wall", "cpu")
                },
                "loss_difference": apart,
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""

    def cell(row: dict[str, Any], clock: str) -> str:
        return " - ".join(f"{row[f'{clock}_speed'][p]:.2f}" for p in ("p20", "p50", "p80"))

    lines = [
        [
            row["engine"],
            f"{row['wall_ms']:.1f}",
            cell(row, "wall"),
            f"{row['cpu_ms']:.1f}",
            cell(row, "cpu"),
            f"{row['loss_difference']:.0e}",
        ]
        for row in rows
    ]
    header = [
        "engine",
        "wall, ms a step",
        "times DDP's speed",
        "CPU of all processes, ms a step",
        "times DDP's speed",
        "loss differs by",
    ]
    return table(header, lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark, prints its table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(model="vit_tiny", image_size=64, patch_size=8, batch=4)
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES)[1:], default=list(ENGINES)[1:], help="besides ddp"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round, after three others")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    options = parser.parse_args(arguments)
    rows = compare(options)
    for row in rows:
        append(options.to, row)
    print(f"{os.cpu_count()} cores, {options.processes} processes, {options.batch} images each\n\n{report(rows)}")


if __name__ == "__main__":
    main()

"""Question: how much faster do we draw the masks of a batch than a loop over images does?

python -m benchmarks.masks [--images 128] [--rounds 30] [--to benchmarks/results/masks.jsonl] [--plot masks.png]

The loop (benchmarks/baseline_masks.py) makes the truncated index tensors of one batch. Ours is timed three times: the
draw alone; the whole call, which also makes the index tensors (truncated or packed); and the call plus `Wanted`, the
patches to request from the target encoder, which the loop has no equivalent of. All take turns on one thread, in CPU
time; each round draws another step, so nothing is cached.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.baseline_masks import LoopMasks
from benchmarks.common import append, draw_bars, in_turns, percentiles, ratios, table
from ijepa_scale import rng
from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import MaskSampler, Wanted

GRIDS = {"224/14": (16, 16), "224/16": (14, 14)}
KINDS = (("multiblock", "truncate"), ("multiblock", "packed"), ("reference", "truncate"))
LOOP, PARTS = "loop", ("draw", "call", "call and wanted")


def measure(grid: tuple[int, int], sampler: str, context: str, images: int, rounds: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of the loop and of our parts, one value per round."""
    config = BlockMaskConfig(sampler=sampler, context=context, group_size=images)
    loop = LoopMasks(BlockMaskConfig(sampler="reference"), grid)
    ours = {part: MaskSampler(config, grid, seed=0) for part in PARTS}
    generator = rng.generator(0, "benchmark")

    def whole(step: int) -> Wanted:
        return Wanted.of(ours["call and wanted"](step, 0, images, images), images, grid[0] * grid[1])

    works: dict[str, Any] = {
        LOOP: lambda step: loop(step, images, generator),
        "draw": lambda step: ours["draw"]._sample(step, 0, images),
        "call": lambda step: ours["call"](step, 0, images, images),
        "call and wanted": whole,
    }
    return in_turns(works, rounds)


def main() -> None:
    """Runs the benchmark, prints its table, and writes the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="images that share one cut (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, bars = [], {}
    for name, grid in GRIDS.items():
        for sampler, context in KINDS:
            found = measure(grid, sampler, context, options.images, options.rounds)
            row: dict[str, Any] = {"benchmark": "masks", "grid": name, "sampler": sampler, "context": context}
            row |= {"images": options.images, "unit": "ms, CPU time"}
            row |= {part: percentiles([1e3 * value for value in values]) for part, values in found.items()}
            row["times_loop"] = {part: ratios(found[LOOP], found[part]) for part in PARTS}
            append(options.to, row)
            cells = [f"{row[part]['p50']:.2f} ms, {row['times_loop'][part]['p50']:.1f} x" for part in PARTS]
            lines.append([name, f"{sampler}, {context}", f"{row[LOOP]['p50']:.1f} ms", *cells])
            bars[f"{name} {sampler}, {context}"] = row["times_loop"]["call and wanted"]["p50"]
    print(table(["grid", "masks", "loop over images", *(f"ours: {part}" for part in PARTS)], lines))
    if options.plot:
        draw_bars(bars, options.plot, "speed relative to the loop, for call and wanted")


if __name__ == "__main__":
    main()

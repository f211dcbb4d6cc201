"""Runs all GPU measurements with one command, in under nine minutes.

python -m benchmarks.gpu_suite [--dry-run] [--items NAME ...] [--images FOLDER_OR_TAR] [--folder benchmarks/results]
python -m benchmarks.gpu_suite --device cpu --quick      # tests the suite itself, with toy sizes

Runs the GPU tests; the compiled step (H/14@224, g/16@224, H/16@448; with truncated masks, packed masks and the fp8
target; against the eager baseline); the part after backward; training from shards; the kernels; the augmentation; and
the loss curves. Each item runs in a child process with its own time limit. Writes FOLDER/gpu-<date>-<device>.jsonl, .md
and .png. Lists items that were skipped or failed with the reason, and then exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import about, draw_bars, table
from benchmarks.pictures import folder_of
from benchmarks.suite import Item, Outcome, exit_code, plan, run_items, summary
from ijepa_scale.config import EngineConfig

BUDGET_S = 540.0
FP8 = "engine.target_precision=fp8"
PACKED = "masks.context=packed"
TOY = (
    "model.width=48", "model.heads=3", "model.depth=2", "model.predictor_width=24", "model.predictor_depth=1",
    "masks.min_keep=3",
)  # fmt: skip
TOY_FLAGS = ("--model", "vit_tiny", "--image-size", "64", "--patch-size", "8", "--batch", "4", "--device", "cpu")
STEPS = {  # name -> model, image size, patch size, batch, expected seconds
    "step H/14@224": ("vit_huge", 224, 14, 128, 100),
    "step g/16@224": ("vit_giant", 224, 16, 64, 85),
    "step H/16@448": ("vit_huge", 448, 16, 16, 70),
}
SIDES = {"truncated": "ours", "packed": f"ours, {PACKED}", "fp8": f"ours, {FP8}"}


def fp8_missing(device: str) -> str | None:
    """Returns why the fp8 target can't be measured; None if it can."""
    if device == "cpu":
        return "the fp8 target needs a CUDA device"
    if "target_precision" not in EngineConfig.model_fields:
        return "EngineConfig has no target_precision"
    return None


def gpu_items(rows: Path, images: Path, workers: int) -> list[Item]:
    """Returns the items to run on a GPU, the most important first."""
    to, without_fp8 = ("--to", str(rows)), fp8_missing("cuda")
    variants = ["--variant", PACKED] if without_fp8 else ["--variant", PACKED, "--variant", FP8]
    items = [_module("tests", "pytest", ("-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider"), 60)]
    for name, (model, size, patch, batch, seconds) in STEPS.items():
        flags = ("--model", model, "--image-size", str(size), "--patch-size", str(patch), "--batch", str(batch))
        steps = ("--precision", "bf16", "--compile", "--part", "step", "--steps", "12", "--device", "cuda")
        items.append(_module(name, "benchmarks.step", (*flags, *steps, *variants, *to), seconds))
    huge = ("--model", "vit_huge", "--image-size", "224", "--patch-size", "14", "--batch", "128", "--device", "cuda")
    shards = ("--images", str(images), "--workers", str(workers), "--compile", "--precision", "bf16", "--steps", "30")
    fast = "engine.compile=true" if without_fp8 else f"engine.compile=true {FP8}"
    curves = ("--image-size", "224", "--device", "cuda", "--workers", str(workers), "--images", str(images))
    update = (*huge, "--part", "update", "--precision", "bf16", "--steps", "5", *to)
    augment = ("--images", str(images), "--device", "cuda", "--rounds", "3", *to)
    if without_fp8:
        items.append(Item(name="fp8 target", command=(), expected_s=0, limit_s=0, cannot=without_fp8))
    return [
        *items,
        _module("end to end", "benchmarks.end_to_end", (*huge, *shards, *to), 55),
        _module("kernels", "benchmarks.kernels", ("--device", "cuda", *to), 40),
        _module("curves", "benchmarks.curves", (*curves, "--fast", fast, *to), 45),
        _module("update", "benchmarks.step", update, 30),
        _module("augment", "benchmarks.augment", augment, 20),
    ]  # fmt: skip


def quick_items(rows: Path, images: Path) -> list[Item]:
    """Returns the same items with toy sizes for the CPU."""
    to = ("--to", str(rows))
    items = [Item(name="tests", command=(), expected_s=0, limit_s=0, cannot="GPU tests need a CUDA device")]
    for name in STEPS:
        steps = ("--precision", "bf16", "--part", "step", "--steps", "2", "--variant", PACKED)
        items.append(_module(name, "benchmarks.step", (*TOY_FLAGS, *steps, *to, *TOY), 15))
    shards = ("--images", str(images), "--steps", "8")
    update = ("--part", "update", "--steps", "2")
    augment = ("--images", str(images), "--batch", "8", "--rounds", "1")
    return [
        *items,
        Item(name="fp8 target", command=(), expected_s=0, limit_s=0, cannot=fp8_missing("cpu")),
        _module("end to end", "benchmarks.end_to_end", (*TOY_FLAGS, *shards, *to, *TOY), 20),
        _module("kernels", "benchmarks.kernels", ("--device", "cpu", "--quick", *to), 30),
        _module("curves", "benchmarks.curves",
                (*TOY_FLAGS, "--images", str(images), "--steps", "4", "--fast", "engine.checkpointing=full", *to, *TOY),
                20),
        _module("update", "benchmarks.step", (*TOY_FLAGS, *update, *to, *TOY), 15),
        _module("augment", "benchmarks.augment", (*augment, *to), 20),
    ]  # fmt: skip


def _module(name: str, module: str, arguments: tuple[str, ...], expected_s: float) -> Item:
    """Returns an item that runs a module, limited to twice the expected time plus half a minute."""
    return Item(name=name, command=("-m", module, *arguments), expected_s=expected_s, limit_s=2 * expected_s + 30)


def verdicts(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Returns a table row for each goal of the GPU run: the goal, the figure found and whether the goal is met."""
    huge, giant = _step(rows, "vit_huge", 224), _step(rows, "vit_giant", 224)
    end = {row["side"]: row for row in rows if row["benchmark"] == "end to end" and row["model"] == "vit_huge"}
    curves = [row for row in rows if row["benchmark"] == "curves"]
    times, shares = "times_baseline", "share_of_peak"
    packed, fp8 = huge.get(SIDES["packed"], {}), huge.get(SIDES["fp8"], {})
    found: list[tuple[str, Any, float]] = [
        ("H/14@224 truncated, times the baseline", _middle(huge.get(SIDES["truncated"], {}).get(times)), 2.0),
        ("H/14@224 truncated, MFU", huge.get(SIDES["truncated"], {}).get(shares), 0.55),
        ("H/14@224 from shards, of the synthetic step", end.get("ours, from shards", {}).get("of_synthetic"), 0.97),
        ("g/16@224 truncated, MFU", giant.get(SIDES["truncated"], {}).get(shares), 0.55),
        ("H/14@224 fp8 target, times bf16", _middle(fp8.get("times_ours")), 1.15),
        ("H/14@224 packed, MFU of the truncated", packed.get("share_times_ours"), 0.95),
        ("seeds apart over fast from eager", curves[0]["seed_from_seed"] / max(1e-12, curves[0]["fast_from_eager"])
         if curves else None, 1.0),
    ]  # fmt: skip
    return [
        [what, f"{bar:g}", "not measured" if value is None else f"{value:.3g}", _word(value, bar)]
        for what, value, bar in found
    ]


def _word(value: float | None, bar: float) -> str:
    return "" if value is None else "met" if value >= bar else "NOT MET"


def _middle(values: dict[str, float] | None) -> float | None:
    return None if values is None else values["p50"]


def _step(rows: list[dict[str, Any]], model: str, size: int) -> dict[str, dict[str, Any]]:
    """Returns the step benchmark's rows for a model at an image size, by side."""
    chosen = [row for row in rows if row["benchmark"] == "step" and (row["model"], row["image_size"]) == (model, size)]
    return {row["side"]: row for row in chosen}


def steps_table(rows: list[dict[str, Any]]) -> str:
    """Returns a table of all measured steps."""
    lines = []
    for row in (row for row in rows if row["benchmark"] == "step"):
        name = f"{row['model']}/{row['patch_size']}@{row['image_size']}, {row['batch']} images"
        if "failed" in row:
            lines.append([name, row["side"], row["failed"], "", "", "", ""])
            continue
        share, peak, times = row["share_of_peak"], row["peak_bytes"], _middle(row.get("times_baseline"))
        spread = f"{row['p20']:.1f} - {row['p50']:.1f} - {row['p80']:.1f}"
        figures = ["" if share is None else f"{share:.1%}", "" if peak is None else f"{peak / 2**30:.1f}"]
        figures.append("" if times is None else f"{times:.2f}")
        lines.append([name, row["side"], spread, f"{row['images_per_s']:.1f}", *figures])
    return table(["model", "side", "ms per step", "images/s", "share of peak", "GiB", "times the baseline"], lines)


def write(rows: list[dict[str, Any]], outcomes: list[Outcome], path: Path) -> str:
    """Writes the report as Markdown and a picture next to the rows; returns its main part."""
    head = about()
    title = f"{head['device']}, {head['date']}, revision {head['revision']}, PyTorch {head['torch']}"
    parts = [f"# {title}", summary(outcomes), table(["goal", "at least", "found", ""], verdicts(rows))]
    parts += ["## Steps", steps_table(rows)]
    parts += [f"## {each.name}\n\n```\n{each.output}\n```" for each in outcomes if each.output]
    text = "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(text)
    bars = {f"{row['model']}@{row['image_size']} {row['side']}": row["images_per_s"]
            for row in rows if row["benchmark"] == "step" and "failed" not in row}  # fmt: skip
    if bars:
        draw_bars(bars, path.with_suffix(".png"), "images per second")
    return "\n\n".join(parts[1:5])


def main() -> None:
    """Runs the chosen items and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes, for the CPU")
    parser.add_argument("--dry-run", action="store_true", help="list the items and stop")
    parser.add_argument("--items", nargs="+", help="names of items (default: all)")
    parser.add_argument("--images", type=Path, help="folder or tar of class folders (default: generated JPEGs)")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.quick != (options.device == "cpu"):
        parser.error("real sizes take hours on a CPU; give both --quick and --device cpu, or neither")
    if options.device == "cuda" and not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick runs toy sizes, --dry-run lists the items")
    device = re.sub(r"[^a-z0-9]+", "-", about()["device"].lower()).strip("-") if options.device == "cuda" else "cpu"
    path = options.folder / f"gpu-{about()['date']}-{device}{'-quick' if options.quick else ''}.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) if options.dry_run else folder_of(options.images, Path(scratch))
        items = quick_items(path, images) if options.quick else gpu_items(path, images, options.workers)
        unknown = set(options.items or ()) - {item.name for item in items}
        if unknown:
            known = ", ".join(item.name for item in items)
            parser.error(f"unknown --items {', '.join(sorted(unknown))}; choose from {known}")
        chosen = [item for item in items if not options.items or item.name in options.items]
        if options.dry_run:
            print(plan(chosen, options.budget))
            return
        options.folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        outcomes = run_items(chosen, options.budget)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    print(f"\n{write(rows, outcomes, path)}\n\nwritten to {path} (.md, .png)")
    sys.exit(exit_code(outcomes))


if __name__ == "__main__":
    main()

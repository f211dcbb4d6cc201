"""Runs all GPU measurements with one command, in under nine minutes.

python -m benchmarks.gpu_suite [--dry-run] [--items NAME ...] [--images FOLDER_OR_TAR] [--folder benchmarks/results]
python -m benchmarks.gpu_suite --device cpu --quick      # tests the suite itself, with toy sizes

First a smoke test of every engine path; then the ceilings, which are products and attention alone; the step of H/14@224
with truncated masks, packed masks, several mask groups, the fp8 target and fused kernels, against the eager baseline;
training from shards; the step of g/16@224; the kernels; the loss curves; the part after backward; and the augmentation.
Each item runs in a child process with its own time limit, and writes each row when it is measured. Writes
FOLDER/gpu-<date>-<device>.jsonl, and after each item .md and .png. Lists what was skipped or failed with the reason.
Exits with 1 if an item failed or was skipped for a reason that isn't expected (`benchmarks.suite`).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import Row, about, draw_bars, read_rows, table
from benchmarks.pictures import folder_of
from benchmarks.suite import Item, Outcome, exit_code, plan, run_items, summary
from ijepa_kernels.fp8_linear import Fp8UnavailableError, check_capability

BUDGET_S = 540.0
FP8 = "engine.target_precision=fp8"
PACKED = "masks.context=packed"
TRITON = "engine.triton=target_loss optimizer.impl=fused_tail"
FUSED = f"{FP8} {TRITON}"
WORDS = {  # what the report says instead of settings
    PACKED: "packed", FP8: "fp8 target", f" {TRITON}": " and fused kernels", "masks.group_size=": "mask groups of ",
}  # fmt: skip
GROUPS = {"vit_huge": "masks.group_size=32", "vit_giant": "masks.group_size=16"}  # of the ImageNet-22K configurations
HUGE = ("--model", "vit_huge", "--image-size", "224", "--patch-size", "14", "--batch", "128")
GIANT = ("--model", "vit_giant", "--image-size", "224", "--patch-size", "16", "--batch", "64")
TOY = (
    "model.width=48", "model.heads=3", "model.depth=2", "model.predictor_width=24", "model.predictor_depth=1",
    "masks.min_keep=3",
)  # fmt: skip
TOY_FLAGS = ("--model", "vit_tiny", "--image-size", "64", "--patch-size", "8", "--batch", "4", "--device", "cpu")
SIDES = {"truncated": "ours", "packed": f"ours, {PACKED}", "fp8": f"ours, {FP8}", "fused": f"ours, {FUSED}"}
# MFU of H/14@224, 128 images, compiled: in bf16, and with fused kernels and the fp8 target; and times the baseline of
# the latter. The roofline behind them counts the bytes that Inductor's generated code moves.
BARS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bH100\b", {"bf16": 0.43, "fused": 0.50}),
    (r"\bH200\b", {"bf16": 0.48, "fused": 0.55, "times": 2.0}),
    (r"\bA100\b", {"bf16": 0.57}),
)


def fp8_missing() -> str | None:
    """Returns why this machine's GPU can't multiply in fp8; None if it can, or if there is no GPU to ask."""
    try:
        if torch.cuda.is_available():
            check_capability(torch.device("cuda"))
    except Fp8UnavailableError as error:
        return str(error)
    return None


def gpu_items(rows: Path, images: Path, workers: int) -> list[Item]:
    """Returns the items to run on a GPU, in order: first what shows whether it works, then the most important."""
    to, cuda, without_fp8 = ("--to", str(rows)), ("--device", "cuda"), fp8_missing()
    steps = ("--precision", "bf16", "--compile", "--part", "step", "--steps", "12", *cuda)
    packed, fp8, fused = (("--variant", each) for each in (PACKED, FP8, FUSED))
    groups = {model: ("--variant", each) for model, each in GROUPS.items()}
    source = ("--images", str(images), "--workers", str(workers))
    fast = "engine.compile=true" if without_fp8 else f"engine.compile=true {FP8}"
    of_huge = (*packed, *groups["vit_huge"]) if without_fp8 else (*packed, *groups["vit_huge"], *fp8, *fused)
    items = [
        _module("smoke", "benchmarks.smoke", (*cuda, "--brief", *to), 60),
        _module("ceilings", "benchmarks.ceilings", (*cuda, *to), 20),
        _module("step H/14@224", "benchmarks.step", (*HUGE, *steps, *of_huge, *to), 130),
        _module("end to end", "benchmarks.end_to_end",
                (*HUGE, *cuda, *source, "--compile", "--precision", "bf16", "--steps", "80", *to), 130),
        _module("step g/16@224", "benchmarks.step", (*GIANT, *steps, *packed, *groups["vit_giant"], *to), 80),
        _module("kernels", "benchmarks.kernels", (*cuda, *to), 30),
        _module("curves", "benchmarks.curves", ("--image-size", "224", *cuda, *source, "--fast", fast, *to), 40),
        _module("update", "benchmarks.step",
                (*HUGE, *cuda, "--part", "update", "--precision", "bf16", "--steps", "5", *to), 20),
        _module("augment", "benchmarks.augment", ("--images", str(images), *cuda, "--rounds", "3", *to), 15),
    ]  # fmt: skip
    if without_fp8:
        items.insert(3, Item(name="fp8 target", command=(), expected_s=0, limit_s=0, cannot=without_fp8))
    return items


def quick_items(rows: Path, images: Path) -> list[Item]:
    """Returns the same items with toy sizes for the CPU."""
    to, cpu, source = ("--to", str(rows)), ("--device", "cpu"), ("--images", str(images))
    steps = ("--precision", "bf16", "--part", "step", "--steps", "2", "--variant", PACKED)
    groups = ("--variant", "masks.group_size=2")
    return [
        _module("smoke", "benchmarks.smoke", (*cpu, *to), 100),
        _module("ceilings", "benchmarks.ceilings", (*cpu, "--quick", *to), 10),
        _module("step H/14@224", "benchmarks.step", (*TOY_FLAGS, *steps, *groups, *to, *TOY), 15),
        _module("end to end", "benchmarks.end_to_end", (*TOY_FLAGS, *source, "--steps", "8", *to, *TOY), 30),
        _module("step g/16@224", "benchmarks.step", (*TOY_FLAGS, *steps, *to, *TOY), 15),
        _module("kernels", "benchmarks.kernels", (*cpu, "--quick", *to), 60),
        _module("curves", "benchmarks.curves",
                (*TOY_FLAGS, *source, "--steps", "4", "--fast", "engine.checkpointing=full", *to, *TOY), 20),
        _module("update", "benchmarks.step", (*TOY_FLAGS, "--part", "update", "--steps", "2", *to, *TOY), 15),
        _module("augment", "benchmarks.augment", (*source, *cpu, "--batch", "8", "--rounds", "1", *to), 20),
    ]  # fmt: skip


def _module(name: str, module: str, arguments: tuple[str, ...], expected_s: float) -> Item:
    """Returns an item that runs a module, limited to twice the expected time plus half a minute."""
    return Item(name=name, command=("-m", module, *arguments), expected_s=expected_s, limit_s=2 * expected_s + 30)


def bars_for(device: str) -> dict[str, float]:
    """Returns the bars for a GPU by its name; none for others, whose figures are listed without a verdict."""
    return next((bars for pattern, bars in BARS if re.search(pattern, device)), {})


def verdicts(rows: list[Row], device: str) -> list[list[str]]:
    """Returns a table row for each goal of the GPU run: the goal, its bar on this GPU if any, figure and verdict."""
    huge, giant = _step(rows, "vit_huge", 224), _step(rows, "vit_giant", 224)
    end = {row["side"]: row for row in rows if row["benchmark"] == "end to end" and row["model"] == "vit_huge"}
    curves = [row for row in rows if row["benchmark"] == "curves"]
    bars, grouped = bars_for(device), huge.get(f"ours, {GROUPS['vit_huge']}", {})
    truncated, packed, fp8, fused = (huge.get(SIDES[side], {}) for side in ("truncated", "packed", "fp8", "fused"))
    found: list[tuple[str, float | None, float | None]] = [
        ("H/14@224, MFU", truncated.get("share_of_peak"), bars.get("bf16")),
        ("H/14@224, times the baseline", _middle(truncated.get("times_baseline")), None),
        ("H/14@224, fp8 target and fused kernels, MFU", fused.get("share_of_peak"), bars.get("fused")),
        ("H/14@224, fp8 target and fused kernels, times the baseline", _middle(fused.get("times_baseline")),
         bars.get("times")),
        ("H/14@224, fp8 target, times bf16", _middle(fp8.get("times_ours")), 1.15),
        ("H/14@224, packed, MFU of the truncated", packed.get("share_times_ours"), 0.95),
        ("H/14@224, 4 mask groups of 32, MFU of one group", grouped.get("share_times_ours"), None),
        ("H/14@224 from shards, of the synthetic step", end.get("ours, from shards", {}).get("of_synthetic"), 0.97),
        ("H/14@224 whole run, of the synthetic step", end.get("ours, whole run", {}).get("of_synthetic"), None),
        ("g/16@224, MFU", giant.get(SIDES["truncated"], {}).get("share_of_peak"), None),
        ("200 steps: distance of seeds over that of fast from eager",
         curves[0]["seed_from_seed"] / max(1e-12, curves[0]["fast_from_eager"]) if curves else None, 1.0),
    ]  # fmt: skip
    return [[what, "" if bar is None else f"{bar:g}", _figure(value), _word(value, bar)] for what, value, bar in found]


def _figure(value: float | None) -> str:
    return "not measured" if value is None else "over 1000" if value > 1000 else f"{value:.3g}"


def _word(value: float | None, bar: float | None) -> str:
    return "" if value is None or bar is None else "met" if value >= bar else "NOT MET"


def _middle(values: dict[str, float] | None) -> float | None:
    return None if values is None else values["p50"]


def _step(rows: list[Row], model: str, size: int) -> dict[str, Row]:
    """Returns the step benchmark's rows for a model at an image size, by side."""
    chosen = [row for row in rows if row["benchmark"] == "step" and (row["model"], row["image_size"]) == (model, size)]
    return {row["side"]: row for row in chosen}


def model_of(row: Row) -> str:
    """Returns model, patch size and image size of a step's row."""
    return f"{row['model']}/{row['patch_size']}@{row['image_size']}"


def side_of(row: Row) -> str:
    """Returns the side of a step's row in words instead of settings."""
    side: str = row["side"]
    for setting, words in WORDS.items():
        side = side.replace(setting, words)
    return side


def steps_table(rows: list[Row]) -> str:
    """Returns a table of all measured steps."""
    lines = []
    for row in (row for row in rows if row["benchmark"] == "step"):
        name, side = f"{model_of(row)}, {row['batch']} images", side_of(row)
        if "failed" in row:
            lines.append([name, side, row["failed"], "", "", "", ""])
            continue
        share, peak, times = row["share_of_peak"], row["peak_bytes"], _middle(row.get("times_baseline"))
        spread = f"{row['p20']:.1f} - {row['p50']:.1f} - {row['p80']:.1f}"
        figures = ["" if share is None else f"{share:.1%}", "" if peak is None else f"{peak / 2**30:.1f}"]
        figures.append("" if times is None else f"{times:.2f}")
        lines.append([name, side, spread, f"{row['images_per_s']:.1f}", *figures])
    return table(["model", "side", "ms per step", "images/s", "share of peak", "GiB", "times the baseline"], lines)


def write(rows: list[Row], outcomes: list[Outcome], path: Path) -> str:
    """Writes the report as Markdown and a picture next to the rows; returns its main part."""
    head = about()
    title = f"{head['device']}, {head['date']}, revision {head['revision']}, PyTorch {head['torch']}"
    goals = table(["goal", "at least", "found", ""], verdicts(rows, head["device"]))
    parts = [f"# {title}", summary(outcomes), goals, "## Steps", steps_table(rows)]
    parts += [f"## {each.name}\n\n```\n{each.output}\n```" for each in outcomes if each.output]
    text = "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(text)
    bars = {
        f"{model_of(row)}, {side_of(row)}": row["images_per_s"]
        for row in rows
        if row["benchmark"] == "step" and "failed" not in row
    }
    if bars:
        draw_bars(bars, path.with_suffix(".png"), f"images per second, {head['device']}")
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
        outcomes, text = [], ""
        for outcome in run_items(chosen, options.budget):
            outcomes.append(outcome)
            text = write(read_rows(path), outcomes, path)
    print(f"\n{text}\n\nwritten to {path} (.md, .png)")
    sys.exit(exit_code(outcomes))


if __name__ == "__main__":
    main()

"""Question: do fast settings follow the loss curve of eager settings more closely than a second seed does?

python -m benchmarks.curves --fast engine.compile=true --steps 200 --model vit_small --batch 32 [--device cuda]
    [--images FOLDER_OR_TAR] [--precision bf16] [--to FILE] [--plot FILE] [section.key=value ...]

Trains on photographs with each setting and the seeds 0 and 1; for one seed, data, masks and starting weights are the
same. The curves agree if the mean distance between fast and eager over all steps is smaller than the distance between
the eager runs of the two seeds. Exits with 1 if they don't.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch

from benchmarks.common import append
from benchmarks.pictures import folder_of, shards_of
from benchmarks.synthetic import add_model_flags, alone, configured, settings_of
from ijepa_scale.train.pretrain import PretrainTask

SEEDS = (0, 1)


def curve(settings: list[str], seed: int, device: torch.device) -> np.ndarray:
    """Returns the losses of a run, one per step."""
    torch.compiler.reset()  # graphs of the previous run would count towards torch.compile's limit
    run = PretrainTask(configured([*settings, f"seed={seed}"]), alone(device))
    losses = [run.step(batch).loss for batch in run.loader(0)]
    return torch.stack(losses).double().cpu().numpy()


def distances(curves: dict[str, list[np.ndarray]]) -> tuple[float, float]:
    """Returns the mean distance of fast from eager for the worse seed, and that between two seeds' eager runs."""
    pairs = zip(curves["fast"], curves["eager"], strict=True)
    between = max(float(np.abs(fast - eager).mean()) for fast, eager in pairs)
    return between, float(np.abs(curves["eager"][0] - curves["eager"][1]).mean())


def draw(curves: dict[str, list[np.ndarray]], path: Path) -> None:
    """Draws all curves into a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for name, runs in curves.items():
        for seed, losses in zip(SEEDS, runs, strict=True):
            axes.plot(losses, label=f"{name}, seed {seed}", color="#888" if name == "eager" else "#1f77b4",
                      linestyle="-" if seed == SEEDS[0] else ":")  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Trains with both settings, compares the curves, and writes the row and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(batch=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--fast", default="", help="overrides of the fast setting, in one argument")
    parser.add_argument("--images", type=Path, help="folder or tar of class folders (default: generated JPEGs)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--to", type=Path, help="JSONL file that the row is appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device(options.device)
    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_of(folder_of(options.images, Path(scratch)), Path(scratch))
        own = [f"data.train={shards}", "data.reader=shards", f"data.workers={options.workers}"]
        eager = [*settings_of(options, options.precision), *own, f"schedule.stop_after={options.steps}"]
        settings = {"eager": eager, "fast": [*eager, *options.fast.split()]}
        about = {
            "model": options.model, "batch": options.batch, "precision": options.precision, "steps": options.steps,
            "fast": options.fast,
        }  # fmt: skip
        curves: dict[str, list[np.ndarray]] = {name: [] for name in settings}
        for name, each in settings.items():
            for seed in SEEDS:
                curves[name].append(curve(each, seed, device))
                losses = curves[name][-1].tolist()
                append(options.to, {"benchmark": "curve", **about, "setting": name, "seed": seed, "losses": losses})
    between, seeds = distances(curves)
    row = {
        "benchmark": "curves", **about, "unit": "mean distance of losses", "fast_from_eager": between,
        "seed_from_seed": seeds, "agree": between < seeds,
        "last_losses": {name: [float(run[-1]) for run in runs] for name, runs in curves.items()},
    }  # fmt: skip
    append(options.to, row)
    verdict = "agree" if row["agree"] else "DISAGREE"
    print(f"fast and eager {verdict}: {between:.2e} apart over {options.steps} steps; two seeds are {seeds:.2e} apart")
    if options.plot:
        draw(curves, options.plot)
    sys.exit(0 if row["agree"] else 1)


if __name__ == "__main__":
    main()

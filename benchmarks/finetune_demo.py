"""Question: does finetuning from the demo's encoder beat training from scratch, with the same budget?

python -m benchmarks.finetune_demo --init runs/demo [--seeds 3] [--to benchmarks/results/finetune_demo.jsonl]

Runs configs/finetune/demo_finetune.yaml (500 labelled Fashion-MNIST images, 10,000 held-out images) from both starts
with each seed, one after another in one process. Accuracies are measured after the last step.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import append, table
from ijepa_scale.config import load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.engine.world import World
from ijepa_scale.train.finetune import finetune

CONFIG = Path(__file__).parents[1] / "configs" / "finetune" / "demo_finetune.yaml"


def accuracy(init: str | None, seed: int, folder: Path, overrides: list[str]) -> float:
    """Returns the top-1 accuracy after the last step, from 0 to 1."""
    fixed = [
        f"seed={seed}", f"folder={folder}", "engine.strategy=plain", "engine.device=cpu", "logging.progress=none",
        "logging.tensorboard=false", "evaluate.every_epochs=1000", f"model.init={init or 'null'}",
    ]  # fmt: skip
    config = load_config(CONFIG, [*fixed, *overrides], kind=FinetuneConfig)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    top1 = finetune(config, world).top1
    assert top1 is not None  # the configuration names held-out images
    return top1


def main() -> None:
    """Runs the benchmark, prints its table and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="run folder of the demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("overrides", nargs="*", help="changes to the configuration of both starts")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    starts = {"pretrained": options.init, "from scratch": None}
    found: dict[str, list[float]] = {name: [] for name in starts}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            for name, init in starts.items():
                folder = Path(scratch) / f"{name.split()[0]}-{seed}"
                found[name].append(accuracy(init, seed, folder, options.overrides))
                about = {"benchmark": "finetune demo", "start": name, "seed": seed}
                append(options.to, {**about, "top1": found[name][-1]})
    rows = []
    for name, values in found.items():
        mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        rows.append([name, f"{mean:.1%} ± {std:.1%}", ", ".join(f"{value:.1%}" for value in values)])
        append(options.to, {"benchmark": "finetune demo", "start": name, "top1": values, "mean": mean, "std": std})
    print(table(["start", "top-1, mean ± standard deviation over seeds", "each"], rows))


if __name__ == "__main__":
    main()

"""Question: does continued pretraining on 600 photographs of clothing improve the demo's encoder, by its kNN accuracy?

python -m benchmarks.continue_demo --init runs/demo --photos FOLDER [--seeds 3] [--to FILE.jsonl]

FOLDER holds class folders in train/ and val/. The baseline is the frozen encoder (`knn_start`), measured in the same
run before its first step. configs/continue.yaml gives the recipe, with the demo's masks, since both see 28 pixels;
sizes and normalisation come from the encoder. Runs are as long for every seed, and are measured after the last step.
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
from ijepa_scale.engine.world import World
from ijepa_scale.train.pretrain import pretrain

CONFIG = Path(__file__).parents[1] / "configs" / "continue.yaml"


def accuracies(init: str, photos: Path, seed: int, folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Returns the kNN accuracy of the frozen and of the adapted encoder, from 0 to 1."""
    fixed = [
        f"seed={seed}", f"folder={folder}", f"model.init={init}", "engine.strategy=plain", "engine.device=cpu",
        "engine.precision=fp32", "logging.progress=none", "logging.tensorboard=false", "data.reader=imagefolder",
        f"data.train={photos / 'train'}", "data.batch_size=64", "data.workers=1", "masks.sampler=reference",
        "masks.min_keep=3", "masks.group_size=64", "evaluate.reader=imagefolder", f"evaluate.train={photos / 'train'}",
        f"evaluate.test={photos / 'val'}", "evaluate.every=1000000", "checkpoint.every=0",
    ]  # fmt: skip
    result = pretrain(
        load_config(CONFIG, [*fixed, *overrides]),
        World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")),
    )
    return result.untrained["knn"], result.evaluated["knn"]


def main() -> None:
    """Runs the benchmark, prints its table and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="run folder of the demo")
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("overrides", nargs="*", help="changes to the configuration")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            folder = Path(scratch) / str(seed)
            frozen, adapted = accuracies(options.init, options.photos, seed, folder, options.overrides)
            found.append((frozen, adapted))
            about = {"benchmark": "continue demo", "seed": seed, "overrides": options.overrides}
            append(options.to, {**about, "knn_frozen": frozen, "knn_adapted": adapted})
    gains = np.array([adapted - frozen for frozen, adapted in found])
    rows = [[str(seed), f"{f:.1%}", f"{a:.1%}", f"{100 * (a - f):+.1f}"] for seed, (f, a) in enumerate(found)]
    spread = gains.std(ddof=1) if len(gains) > 1 else float("nan")
    rows.append(["mean", "", "", f"{100 * gains.mean():+.1f} ± {100 * spread:.1f}"])
    print(table(["seed", "frozen", "adapted", "points"], rows))


if __name__ == "__main__":
    main()

"""Question: do forced collapses raise the alarm of `health`, and do healthy runs raise none?

python -m benchmarks.health [--shards FOLDER] [--images FOLDER_OR_TAR] [--only WORD] [--to FILE] [--plot FILE]

Trains 20 healthy runs of 500 steps, with different seeds, data, models, rates and masks, and three that must collapse:
without momentum, at a learning rate far too high, and on images that are all the same. Images are those of the demo
(`make demo` writes the shards) and photographs (by default JPEGs generated for the run). Takes about eight minutes of
one core. Exits with 1 if an alarm is missing or wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import Row, record
from benchmarks.pictures import folder_of
from benchmarks.synthetic import alone
from ijepa_scale.config import load_config
from ijepa_scale.metrics.health_plots import draw_health
from ijepa_scale.metrics.sinks import JSONL_NAME
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.train.pretrain import pretrain

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
STEPS = 500
COMMON = (
    "data.workers=0", "engine.device=cpu", "engine.strategy=plain", "evaluate.every=0", "checkpoint.every=0",
    "logging.tensorboard=false", "logging.progress=none", "health.every=50",
)  # fmt: skip
BATCH = ("data.batch_size=32", "masks.group_size=32")
SMALL = (*BATCH, "model.width=48", "model.depth=2", "model.predictor_width=24", "model.predictor_depth=1")
TINY = (*BATCH, "model.width=32", "model.depth=1", "model.heads=2", "model.predictor_width=16",
        "model.predictor_depth=1")  # fmt: skip
DEEP = (*BATCH, "model.width=48", "model.depth=5", "model.predictor_width=24", "model.predictor_depth=2")
PHOTOS = ("model.image_size=64", "model.patch_size=8", "masks.sampler=multiblock",
          "augment.mean=[0.485,0.456,0.406]", "augment.std=[0.229,0.224,0.225]")  # fmt: skip
NO_MOMENTUM, HIGH_RATE = "schedule.momentum=[0.0,0.0]", ("optimizer.lr=1.0", "optimizer.start_lr=1.0")
# name -> data, settings
HEALTHY: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"seed {seed}": ("shards", (*SMALL, f"seed={seed}")) for seed in range(4)},
    **{f"lr {lr}": ("shards", (*SMALL, f"optimizer.lr={lr}")) for lr in ("3e-4", "2e-3", "4e-3")},
    **{f"momentum {m}": ("shards", (*SMALL, f"schedule.momentum=[{m},1.0]")) for m in ("0.99", "0.996")},
    **{f"sampler {name}": ("shards", (*SMALL, f"masks.sampler={name}")) for name in ("multiblock", "random")},
    "packed": ("shards", (*SMALL, "masks.context=packed")),
    **{f"loss {name}": ("shards", (*SMALL, f"objective.loss={name}")) for name in ("l2", "cosine")},
    "tiny": ("shards", TINY),
    "deep": ("shards", DEEP),
    "demo": ("shards", ()),
    **{f"photos, seed {seed}": ("images", (*SMALL, *PHOTOS, f"seed={seed}")) for seed in range(2)},
    "photos, tiny": ("images", (*TINY, *PHOTOS, "optimizer.lr=2e-3")),
}
COLLAPSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "collapse: momentum 0": ("shards", (*SMALL, NO_MOMENTUM)),
    "collapse: learning rate 1": ("shards", (*SMALL, *HIGH_RATE)),
    "collapse: images all the same": ("same", (*SMALL, *PHOTOS)),
}


def same_images(folder: Path) -> Path:
    """Writes equal grey images into `folder`, and returns it."""
    folder.mkdir()
    for number in range(64):
        Image.fromarray(np.full((64, 64, 3), 120, dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def measure(name: str, data: dict[str, list[str]], scratch: Path) -> Row:
    """Returns the row of a run: its alarms, and the range of its figures as shares of the first."""
    kind, settings = (HEALTHY | COLLAPSES)[name]
    folder = scratch / name.replace(":", "").replace(" ", "-")
    config = load_config(DEMO, [*COMMON, *data[kind], *settings, f"folder={folder}", f"schedule.stop_after={STEPS}"])
    begin = time.process_time()
    pretrain(config, alone(torch.device("cpu")))
    rows = [row for row in read_rows(folder / JSONL_NAME) if "rank_me" in row]
    alarms = [row["step"] for row in rows if row["alarm"]]
    stds, ranks = ([row[field] - floor for row in rows] for field, floor in (("feature_std", 0), ("rank_me", 1)))
    return {
        "benchmark": "health", "run": name, "must_alarm": name in COLLAPSES,
        "alarm_step": alarms[0] if alarms else None,
        "least_std": min(stds) / max(stds[0], 1e-9), "least_rank": min(ranks) / max(ranks[0], 1e-9),
        "first": rows[0], "last": rows[-1], "cpu_s": time.process_time() - begin,
    }  # fmt: skip


def right(row: Row) -> bool:
    """Returns whether the run raised an alarm just where it must."""
    return row["must_alarm"] == (row["alarm_step"] is not None)


def line(row: Row) -> str:
    """Returns a run's line."""
    alarm = "no alarm" if row["alarm_step"] is None else f"alarm at step {row['alarm_step']}"
    return (
        f"{row['run']}: {alarm}{'' if right(row) else ', WRONG'}; feature_std at least {row['least_std']:.2f} and "
        f"RankMe - 1 at least {row['least_rank']:.2f} times the first; {row['cpu_s']:.0f} s of CPU"
    )


def main() -> None:
    """Trains all runs, writes a row for each, draws the curves of some, and exits with 1 if an alarm is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default="datasets/fashion-mnist/train", help="the demo's shards")
    parser.add_argument("--images", type=Path, help="folder or tar of class folders (default: generated JPEGs)")
    parser.add_argument("--only", default="", help="runs whose name holds this word")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture of healthy and unhealthy curves to write")
    options = parser.parse_args()
    if not options.shards.is_dir():
        parser.error(f"{options.shards} is no folder of shards; run make demo, or give --shards")
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photos = folder_of(options.images, folder / "photos")
        data = {
            "shards": [f"data.train={options.shards}"],
            "images": [f"data.train={photos}", "data.reader=imagefolder"],
            "same": [f"data.train={same_images(folder / 'same')}", "data.reader=imagefolder"],
        }

        def rows() -> Iterator[Row]:
            for name in HEALTHY | COLLAPSES:
                if options.only in name:
                    row = measure(name, data, folder)
                    print(line(row), flush=True)
                    yield row

        found = record(options.to, rows())
        if options.plot:
            shown = {
                "healthy": "seed-0",
                "momentum 0": "collapse-momentum-0",
                "learning rate 1": "collapse-learning-rate-1",
            }
            draw_health({label: folder / name / JSONL_NAME for label, name in shown.items()}, options.plot)
    wrong = [row["run"] for row in found if not right(row)]
    print(f"{len(found)} runs, {len(wrong)} wrong{': ' + ', '.join(wrong) if wrong else ''}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

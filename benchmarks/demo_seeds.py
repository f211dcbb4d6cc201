"""Question: what does the demo's encoder learn, over several seeds, next to the untrained encoder and to raw pixels?

python -m benchmarks.demo_seeds --data datasets/fashion-mnist [--seeds 7] [--to FILE.jsonl] [key=value ...]

Each seed is the demo's training, `configs/demo.yaml` under ZeRO-3 on 2 CPU processes, evaluated after its last step on
the images and with the kNN of its own configuration. The pixels are voted on in the same way.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import append, table
from ijepa_scale import environment
from ijepa_scale.config import load_config
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.evaluator import build_evaluator
from ijepa_scale.evaluate.summary import summarize

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"


def places(data: str) -> list[str]:
    """Returns the overrides that name the demo's images, in the folder `data`."""
    return [f"data.train={data}/train", f"evaluate.train={data}/train", f"evaluate.test={data}/test"]


def trained(seed: int, folder: str, data: str, overrides: list[str]) -> tuple[float, float]:
    """Returns the kNN accuracies, 0 to 1, of the untrained and of the trained target encoder."""
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={environment.free_port()}",
        str(ROOT / "launch" / "pretrain.py"), "--config", str(CONFIG), f"seed={seed}", f"folder={folder}",
        "engine.strategy=deepspeed", f"engine.ds_config={ROOT / 'ds_configs' / 'zero3.json'}", "engine.device=cpu",
        "evaluate.every=1000000", "logging.progress=none", *places(data), *overrides,
    ]  # fmt: skip
    variables = environment.child_environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
    found = summarize(folder)
    assert found.knn is not None and found.knn_untrained is not None
    return found.knn_untrained, found.knn


def of_pixels(data: str, overrides: list[str]) -> float:
    """Returns the kNN accuracy of the images' own values, normalised as for the encoder."""
    config = load_config(CONFIG, [*places(data), *overrides])
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    evaluator = build_evaluator(config, world)
    return evaluator.run(lambda images: images.flatten(1)[:, None])["knn"]


def main() -> None:
    """Runs the benchmark, prints its table and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="datasets/fashion-mnist", help="folder with the demo's train/ and test/")
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to configs/demo.yaml")
    options = parser.parse_intermixed_args()
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            before, after = trained(seed, f"{scratch}/run", options.data, options.overrides)
        found.append((before, after, after - before))
        about = {"benchmark": "demo seeds", "seed": seed, "overrides": options.overrides}
        append(options.to, {**about, "knn_untrained": before, "knn": after})
    pixels = of_pixels(options.data, options.overrides)
    append(options.to, {"benchmark": "demo pixels", "overrides": options.overrides, "knn": pixels})
    rows = [[str(seed), f"{b:.1%}", f"{a:.1%}", f"{100 * gain:+.1f}"] for seed, (b, a, gain) in enumerate(found)]
    if len(found) > 1:
        means, spreads = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
        rows.append(["mean ± sd", *(f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in zip(means, spreads, strict=True))])
    print(table(["seed", "untrained", "trained", "points"], rows))
    print(f"raw pixels: {pixels:.1%}")


if __name__ == "__main__":
    main()

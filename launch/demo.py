"""Pretrains a small I-JEPA on Fashion-MNIST under ZeRO-3 and reports what it learned."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

import torch

from ijepa_scale import environment
from ijepa_scale.data.shards.fashion_mnist import fetch, write_fashion_mnist_shards
from ijepa_scale.errors import UserError
from ijepa_scale.evaluate.summary import summarize
from ijepa_scale.metrics.plots import draw_curves

ROOT = Path(__file__).parents[1]
CPU_PROCESSES = 2
BATCH = 64  # the batch of configs/demo.yaml, which the number of processes must divide


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a mistake that the user can fix, or that of the failed training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion-mnist", metavar="FOLDER", help="folder with the four idx-ubyte files (plain or .gz)")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="run folder (default runs/demo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to configs/demo.yaml")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_fashion_mnist_shards(fetch(options.fashion_mnist), "datasets/fashion-mnist")
        gpus = torch.cuda.device_count()
        processes = max(n for n in range(1, gpus + 1) if BATCH % n == 0) if gpus else CPU_PROCESSES
        child = environment.child_environment(**({} if gpus else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}))
        command = [
            str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={processes}",
            f"--master_port={environment.free_port()}", str(ROOT / "launch" / "pretrain.py"),
            "--config", str(ROOT / "configs" / "demo.yaml"), f"folder={options.folder}", "engine.strategy=deepspeed",
            f"engine.ds_config={ROOT / 'ds_configs' / 'zero3.json'}", *([] if gpus else ["engine.device=cpu"]),
            *options.overrides,
        ]  # fmt: skip
        print("$", " ".join(command), flush=True)
        if code := subprocess.run(command, env=child, check=False).returncode:
            print(f"error: the training ended with exit code {code}; see its message above", file=sys.stderr)
            return code if code > 0 else 1
        draw_curves(options.folder / "metrics.jsonl", options.folder / "curves.png")
        print("", *summarize(options.folder).lines(), sep="\n")
        print(f"on        {processes} {'GPUs' if gpus else 'CPU processes'}, DeepSpeed ZeRO-3")
        print(f"pictures  {options.folder / 'curves.png'}, {options.folder / 'masks.png'}")
        print(f"logs      {options.folder / 'metrics.jsonl'}; tensorboard --logdir {options.folder / 'tensorboard'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

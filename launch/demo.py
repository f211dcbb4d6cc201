"""Pretrains a small I-JEPA on Fashion-MNIST under ZeRO-3 and reports what it learned.

python launch/demo.py
python launch/demo.py --fashion-mnist ~/fashion-mnist --folder runs/first
python launch/demo.py schedule.epochs=2 optimizer.lr=1e-3

Reference: docs/getting-started.md#the-demo
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from ijepa_scale import environment, shipped, terminal
from ijepa_scale.data.shards.fashion_mnist import fetch, write_fashion_mnist_shards
from ijepa_scale.evaluate.summary import summarize

CPU_PROCESSES = 2
BATCH = 64  # the batch of configs/demo.yaml, which the number of processes must divide


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a mistake that the user can fix, or that of the failed training."""
    parser = terminal.Parser(description=__doc__)
    files = "folder with the four idx-ubyte files (plain or .gz)"
    parser.add_argument("--fashion-mnist", metavar="FOLDER", type=terminal.path, help=files)
    parser.add_argument("--folder", type=terminal.path, default="runs/demo", help="run folder (default runs/demo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to configs/demo.yaml")
    options = parser.parse_intermixed_args(arguments)
    folder = Path(options.folder)
    terminal.log_to_terminal()
    write_fashion_mnist_shards(fetch(options.fashion_mnist), "datasets/fashion-mnist")
    gpus = torch.cuda.device_count()
    processes = max(n for n in range(1, gpus + 1) if BATCH % n == 0) if gpus else CPU_PROCESSES
    variables = {} if gpus else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={processes}",
        f"--master_port={environment.free_port()}", f"{shipped.folder('launch')}/pretrain.py",
        "--config", f"{shipped.folder('configs')}/demo.yaml", f"folder={environment.written_path(folder)}",
        "engine.strategy=deepspeed", f"engine.ds_config={shipped.folder('ds_configs')}/zero3.json",
        *([] if gpus else ["engine.device=cpu"]), *options.overrides,
    ]  # fmt: skip
    terminal.say("$ " + " ".join(command))
    if code := subprocess.run(command, env=environment.child_environment(**variables), check=False).returncode:
        terminal.report(f"the training ended with exit code {code}; see its message above")
        return max(code, 1)
    terminal.say("", *summarize(folder).lines())
    terminal.say(f"on        {processes} {'GPUs' if gpus else 'CPU processes'}, DeepSpeed ZeRO-3")
    terminal.say(f"pictures  {folder / 'curves.png'}, {folder / 'masks.png'}")
    terminal.say(f"logs      {folder / 'metrics.jsonl'}; tensorboard --logdir {folder / 'tensorboard'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

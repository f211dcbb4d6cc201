"""Question: is our training step as fast as in another checkout of this repository, and are its losses the same?

git worktree add ../before REVISION
python -m benchmarks.revisions ../before --model vit_small --batch 8 --steps 20 [--to FILE] [section.key=value ...]

Each checkout runs in a process of its own, on one thread. They take turns step by step, each going first every other
step, and CPU time is compared pair by pair, so that a busy machine slows both. Exits with 1 if a loss differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import append, percentiles
from ijepa_scale import environment

HERE = Path(__file__).parents[1]


def serve(settings: list[str], batch: int) -> None:
    """Takes a step for each number on standard input, and prints its CPU seconds and its loss."""
    from benchmarks.synthetic import Ours, configured, images_for, start

    torch.set_num_threads(1)
    config = configured(settings)
    ours = Ours(config, start(config), images_for(config, batch, torch.device("cpu")))
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.process_time()
        loss = float(ours(int(line)))
        print(time.process_time() - begin, repr(loss), flush=True)


def begin(tree: Path, arguments: list[str], links: Path) -> subprocess.Popen:
    """Starts a checkout's process, with its own kernels, and returns it when it is ready."""
    links.mkdir()
    (links / "ijepa_kernels").symlink_to(tree.resolve() / "kernels")
    path = {"PYTHONPATH": f"{tree.resolve()}:{links}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--serve", *arguments],
        env={**environment.child_environment(), **path},
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != "ready":
        if not line:
            raise RuntimeError(f"the checkout {tree} ended before its first step, exit code {process.wait()}")
    return process


def take(process: subprocess.Popen, step: int) -> tuple[float, str]:
    """Returns CPU seconds and loss of a step in a checkout's process."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    seconds, loss = process.stdout.readline().split()
    return float(seconds), loss


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="folder of the other checkout")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="pairs that are compared, after one that isn't")
    parser.add_argument("--to", type=Path, help="JSONL file that the row is appended to")
    parser.add_argument("--set", action="append", default=[], help="section.key=value; can be repeated")
    options = parser.parse_args()
    settings = [f"model.name={options.model}", f"data.batch_size={options.batch}", "engine.strategy=plain"]
    settings += ["model.patch_size=16", "engine.device=cpu", "engine.precision=fp32", *options.set]
    if options.serve:
        serve(settings, options.batch)
        return 0
    if options.other is None or not (options.other / "benchmarks").is_dir():
        parser.error(
            f"{options.other} is no checkout of this repository; add one with git worktree add FOLDER REVISION"
        )
    arguments = ["--model", options.model, "--batch", str(options.batch)]
    arguments += [word for each in options.set for word in ("--set", each)]
    ratios, differing = [], 0
    with tempfile.TemporaryDirectory() as folder:
        ours = begin(HERE, arguments, Path(folder) / "ours")
        other = begin(options.other, arguments, Path(folder) / "other")
        for step in range(options.steps + 1):
            first, second = (ours, other) if step % 2 else (other, ours)
            by_process = {id(first): take(first, step), id(second): take(second, step)}
            (our_seconds, our_loss), (other_seconds, other_loss) = by_process[id(ours)], by_process[id(other)]
            differing += our_loss != other_loss
            if step:
                ratios.append(our_seconds / other_seconds)
        ours.kill()
        other.kill()
    shares = percentiles(ratios)
    print(
        f"CPU time of a step, this checkout / {options.other}, 20-50-80%:", *(f"{each:.3f}" for each in shares.values())
    )
    print(f"losses that differ: {differing} of {options.steps + 1}")
    row = {"benchmark": "revisions", "settings": settings, "other": environment.git_revision(str(options.other))}
    append(options.to, {**row, "cpu_time_ratio": shares, "pairs": options.steps, "losses_differ": differing})
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

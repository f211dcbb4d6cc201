"""Question: does a run that is disturbed at random end with the bits of one that isn't?

python -m benchmarks.soak [--minutes 30] [--every 60 120] [--folder FOLDER] [--steps 2000] [--seed 0] [--log FILE]

Trains a small model on 2 processes under torchrun, undisturbed. Then repeats it under `torchrun --max-restarts` for so
many minutes, and every 60 to 120 seconds kills a process (SIGKILL), asks one to stop (SIGTERM), stops one from running
(SIGSTOP), fills the disk for 20 seconds, or flips a bit in the newest checkpoint and kills a process. Each repetition
must end with the same checkpoint, byte for byte, and the same losses. A small file system is mounted for it (tmpfs, so
it needs to be root); with --folder its disk is used instead and never filled. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ijepa_scale.checkpoint.store import newest
from tests.distributed.commands import final_hashes, losses, start, write_config, write_data

FULL_S = 20  # seconds that the disk is full
SETTINGS = (
    "logging.every=10", "logging.progress=none", "checkpoint.every=50", "checkpoint.max_failures=1000",
    "evaluate.every=500", "health.every=500", "engine.hang_timeout=15", "engine.link_timeout=60",
)  # fmt: skip
SEEN = {
    "resumed from": "times resumed", "can't be written (": "saves failed", "is set aside": "checkpoints set aside",
    "(engine.hang_timeout)": "hangs ended",
}  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=100")


class Soak:
    """The run that is disturbed, its log, and what was done to it."""

    def __init__(self, folder: Path, data: Path, options: argparse.Namespace) -> None:
        self.folder, self.data, self.options = folder, data, options
        self.random = random.Random(options.seed)
        self.begin = time.monotonic()
        self.faults = ["SIGKILL", "SIGTERM", "SIGSTOP", "flipped bit"] + ([] if options.folder else ["full disk"])
        self._left: list[str] = []
        self.due = 0.0  # when the next fault is

    def say(self, text: str) -> None:
        """Prints a line with the time since the start, and appends it to the log."""
        seconds = int(time.monotonic() - self.begin)
        line = f"{seconds // 60:02d}:{seconds % 60:02d}  {text}"
        print(line, flush=True)
        if self.options.log:
            with self.options.log.open("a") as file:
                file.write(line + "\n")

    def start(self, name: str) -> subprocess.Popen:
        """Starts the run of this name, or goes on with it."""
        config = write_config(self.folder.parent / f"{name}.yaml", self.data, self.folder / name)
        steps = f"schedule.epochs={self.options.steps // 10}"
        return start(config, steps, "schedule.warmup_epochs=10", *SETTINGS, launcher=TORCHRUN)

    def disturb(self, name: str, run: subprocess.Popen) -> None:
        """Does one of the faults, each once before any comes again."""
        if not self._left:
            self._left = self.random.sample(self.faults, len(self.faults))
        fault, run_folder = self._left.pop(), self.folder / name
        rank = self.random.randrange(2)
        process, step = processes_of(run)[rank], newest_row(run_folder)
        if fault == "full disk":
            self.say(f"step {step}: disk full for {FULL_S} s")
            filler = self.folder / "filler"
            fill(filler)
            time.sleep(FULL_S)
            filler.unlink()
            return
        if fault == "flipped bit":
            flipped = flip_bit(run_folder, self.random)
            self.say(f"step {step}: a bit flipped in {flipped}, and SIGKILL to process {rank}")
        else:
            self.say(f"step {step}: {fault} to process {rank}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL if fault == "flipped bit" else getattr(signal, fault))

    def repeat(self, name: str) -> None:
        """Trains to the end, disturbed."""
        run, before = self.start(name), 0
        while (code := run.poll()) != 0:
            if code is not None:
                self.say(f"torchrun ended with code {code}; started again")
                run = self.start(name)
            step = newest_row(self.folder / name)
            if time.monotonic() > self.due and step > before and len(processes_of(run)) == 2:  # it trains again
                self.disturb(name, run)
                self.due, before = self._next(), step
            time.sleep(0.5)
        log = (self.folder.parent / f"{name}.log").read_text()
        counts = (f"{log.count(words)} {what}" for words, what in SEEN.items())
        self.say(f"its log: {', '.join(counts)}")

    def _next(self) -> float:
        return time.monotonic() + self.random.uniform(*self.options.every)


def processes_of(run: subprocess.Popen) -> list[int]:
    """Returns the training processes that torchrun has started, in the order of their ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
            if parent == run.pid and "LOCAL_RANK" in variables:
                found.append((int(variables["LOCAL_RANK"]), int(folder.name)))
    return [process for _, process in sorted(found)]


def newest_row(folder: Path) -> int:
    """Returns the step of the last row."""
    return max(losses(folder), default=0)


def fill(path: Path) -> None:
    """Writes until the file system is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def flip_bit(folder: Path, chosen: random.Random) -> str:
    """Flips a bit of a file of the newest checkpoint, and returns its name."""
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        return "no checkpoint: there is none"
    path = chosen.choice(sorted(checkpoint.glob("*")))
    with path.open("r+b") as file:
        place = chosen.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << chosen.randrange(8))]))
    return f"{checkpoint.name}/{path.name}"


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """Mounts a file system of 40 MB."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
        try:
            yield disk
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def main() -> int:
    """Trains undisturbed, then disturbed until the time is over, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of disturbed training; the last one is completed")
    parser.add_argument("--every", type=float, nargs=2, default=(60, 120), help="seconds between two faults")
    parser.add_argument("--folder", type=Path, help="where to train (default: a file system mounted for it)")
    parser.add_argument("--steps", type=int, default=2000, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--log", type=Path, help="file that the log is appended to")
    options = parser.parse_args()
    with contextlib.nullcontext(options.folder) if options.folder else small_disk() as folder:
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, write_data(folder.parent / "data"), options)
        code = soak.start("undisturbed").wait()
        assert code == 0, (folder.parent / "undisturbed.log").read_text()
        soak.say(f"undisturbed: {options.steps} steps")
        expected, weights = losses(folder / "undisturbed"), final_hashes(folder / "undisturbed")
        began, number, same = time.monotonic(), 0, True
        soak.due = began + options.every[0]
        while time.monotonic() < began + 60 * options.minutes:
            number += 1
            soak.repeat(f"disturbed-{number}")
            run = folder / f"disturbed-{number}"
            equal = losses(run) == expected and final_hashes(run) == weights
            soak.say(f"disturbed {number}: {'equal bit for bit' if equal else 'DIFFERS'}")
            same = same and equal
            if equal:
                shutil.rmtree(run)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

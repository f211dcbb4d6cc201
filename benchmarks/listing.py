"""How long does listing a folder take, and how much memory, compared with os.scandir alone?

python -m benchmarks.listing --files 1000000 --classes 1000 --scratch /tmp/listing [--out FILE.jsonl]

Writes a tree of empty files ROOT/CLASS/NAME.jpg below `--scratch`, or ROOT/NAME.jpg with `--classes 0`, lists it in a
new process for each way and turn, and removes it. The ways take turns; the first turn, after the tree was written,
isn't counted. The page cache is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import append, percentiles, table
from ijepa_scale.data.sources.folder import ImageFolderSource

WAYS = ("os.scandir alone", "torchvision ImageFolder", "ImageFolderSource")


def scan(root: str) -> int:
    """Returns the number of files below a folder, by os.scandir alone: nothing is kept, sorted or checked."""
    count, folders = 0, [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    count += 1
    return count


def measure(way: str, root: str) -> dict[str, float]:
    """Returns seconds, CPU seconds and the growth of the peak memory in bytes of one listing in this process."""
    if way == WAYS[1]:
        from torchvision.datasets import ImageFolder  # takes 2 s to import, so only where it is measured
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak start again from what is used now
    before = _kilobytes("VmHWM")
    wall, cpu = time.perf_counter(), time.process_time()
    if way == WAYS[0]:
        count = scan(root)
    elif way == WAYS[1]:
        count = len(ImageFolder(root))
    else:
        count = ImageFolderSource(root).num_samples
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    grown = (_kilobytes("VmHWM") - before) * 1024
    return {"files": count, "wall_s": wall, "cpu_s": cpu, "peak_bytes": grown}


def _kilobytes(name: str) -> int:
    """Returns an entry of /proc/self/status in units of 1024 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def write_tree(root: Path, files: int, classes: int) -> None:
    """Writes empty files with names like ImageNet's, `files` in all; without classes, into the root itself."""
    for number in range(max(1, classes)):
        folder = root / f"n{number:08d}" if classes else root
        folder.mkdir(parents=True)
        for image in range(number, files, max(1, classes)):
            os.close(os.open(folder / f"{folder.name}_{image}.JPEG", os.O_CREAT | os.O_WRONLY, 0o644))


def main() -> None:
    """Measures, prints a table and, with --out, appends a JSONL row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/listing"), help="a folder that doesn't exist yet")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, str(options.scratch))))
        return
    try:
        write_tree(options.scratch, options.files, options.classes)
        command = [sys.executable, "-m", "benchmarks.listing", "--scratch", str(options.scratch), "--measure"]
        ways = [way for way in WAYS if options.classes or way != WAYS[1]]  # which refuses a folder without classes
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(options.turns + 1):
            for way in ways:
                row = json.loads(subprocess.run([*command, way], check=True, capture_output=True, text=True).stdout)
                if row["files"] != options.files:
                    raise SystemExit(f"{way} lists {row['files']} of {options.files} files")
                if turn:
                    found[way].append(row)
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)
    rows = []
    for way, turns in found.items():
        cpu, wall = (percentiles([row[key] for row in turns]) for key in ("cpu_s", "wall_s"))
        peak = max(row["peak_bytes"] for row in turns)
        facts = {"files": options.files, "classes": options.classes}
        append(options.out, {"bench": "listing", "way": way, **facts, "cpu_s": cpu, "wall_s": wall, "peak_bytes": peak})
        rows.append(
            [way, *(" - ".join(f"{one:.2f}" for one in unit.values()) for unit in (cpu, wall)), f"{peak / 1e6:.0f}"]
        )
    print(table(["listing", "CPU-seconds, 20-50-80 %", "seconds, 20-50-80 %", "peak memory, MB"], rows))


if __name__ == "__main__":
    main()

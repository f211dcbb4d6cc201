"""Checks the folders of a run and of its data: speed, room, and whether all hosts see the same ones.

Each question is asked in a process of its own (`disk_probe`), since a disk that hangs can't be left otherwise.
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ijepa_scale.doctor.finding import Finding, size_text
from ijepa_scale.no_answer import NoAnswer

PROBE = Path(__file__).parent / "disk_probe.py"
LIMIT_S = 20.0  # of each question
SPEED_S = 4.0  # of each measurement
SLOW = 20e6  # bytes per second: a tenth of a hard disk; a checkpoint of 10 GB would take 8 minutes
SLOW_FILES = 20.0  # files made and deleted per second
_MEASURED, _JUDGED = 64 << 20, 4 << 20  # bytes
_IMAGES = 16


def ask(what: str, limit_s: float, /, **arguments: object) -> dict[str, Any]:
    """Returns what the probe answers.

    Raises:
        NoAnswer: it doesn't in time.
        OSError: it can't, and says why.
    """
    command = [sys.executable, "-I", "-S", str(PROBE), json.dumps({"do": what, **arguments})]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        answer, problem = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)  # one that waits for a disk ends when that answers
        raise NoAnswer(limit_s) from None
    if child.returncode:
        lines = problem.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
        raise OSError(lines[-1])
    found: dict[str, Any] = json.loads(answer)
    return found


def run_folder(folder: str, checkpoint_bytes: float | None) -> Iterator[Finding]:
    """Yields the speed and the room of the run's folder; `checkpoint_bytes` is the size of one checkpoint, if known."""
    found = ask("write", LIMIT_S, folder=folder, size=_MEASURED, seconds=SPEED_S)
    problems = []
    for name in ("write", "read"):
        if found[f"{name}_bytes_per_s"] < SLOW:
            problems.append((f"it {name}s slowly", "use a faster disk for the runs"))
    if found["files_per_s"] < SLOW_FILES:
        problems.append(("it makes files slowly", "use another file system for the runs"))
    needed = max(1e9, 3 * (checkpoint_bytes or 0.0))  # the newest two, and one that is being written
    if found["free_bytes"] < needed:
        problems.append((f"it is too full for {size_text(needed)} of checkpoints", "free space, or use another disk"))
    if found["free_files"] is not None and found["free_files"] < 1000:
        problems.append((f"it has room for {found['free_files']} more files", "delete files, or use another disk"))
    save = ""
    if checkpoint_bytes:
        save_s = checkpoint_bytes / found["write_bytes_per_s"]
        save = f"; a checkpoint of {size_text(checkpoint_bytes)} takes {save_s:.2g} s"
    yield Finding(
        check="run folder",
        found=f"{found['folder']} ({found['filesystem']}): writes {size_text(found['write_bytes_per_s'])}/s, reads "
        f"{size_text(found['read_bytes_per_s'])}/s, {found['files_per_s']:.0f} files/s, "
        f"{size_text(found['free_bytes'])} free{save}" + "".join(f"; {what}" for what, _ in problems),
        verdict="wrong" if problems else "ok",
        remedy="; ".join(dict.fromkeys(remedy for _, remedy in problems)),
        values=found,
    )


def data_folder(path: str) -> tuple[Finding, list[bytes]]:
    """Returns how fast the data can be read, and its first images, none if there aren't any."""
    found = ask("read", LIMIT_S, path=path, size=_MEASURED, seconds=SPEED_S, images=_IMAGES)
    images = [base64.b64decode(text) for text in found.pop("images")]
    speed = found["read_bytes_per_s"]
    if not speed:
        remedy = "name the images with --data or data.train: a folder, tars, or a list"
        return Finding(check="data", found=f"{path}: no images", verdict="wrong", remedy=remedy, values=found), []
    judged = found["bytes"] >= _JUDGED  # of a few small files, opening is all that is measured
    wrong = judged and speed < SLOW
    found_text = (
        f"{path} ({found['filesystem']}): reads {size_text(speed)}/s, measured on {size_text(found['bytes'])} in "
        f"{found['files']} files" + ("" if judged else ", too few to judge it")
    )
    remedy = "copy the data to a faster disk, or pack small files into shards with launch/shards.py" if wrong else ""
    return Finding(
        check="data", found=found_text, verdict="wrong" if wrong else "ok", remedy=remedy, values=found
    ), images


__all__ = ["LIMIT_S", "ask", "data_folder", "run_folder"]

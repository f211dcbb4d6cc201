"""Lists, verifies, compares and removes the checkpoints of a run. Reads only, except for `remove`."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ijepa_scale.checkpoint import folder as steps
from ijepa_scale.checkpoint.manifest import MANIFEST, damage_of
from ijepa_scale.checkpoint.store import Checkpoint
from ijepa_scale.errors import CheckpointError, ConfigError

FOLDERS = ("checkpoints", "best", "stopped")  # of a run


class Line(NamedTuple):
    """A checkpoint of a listing."""

    path: Path
    step: int
    bytes: int
    files: int
    written: str  # date and time
    problem: str | None


def checkpoints_of(run: Path) -> list[Path]:
    """Returns the checkpoints of a run in the order of the steps, best and stopped ones and damaged ones too.

    Raises:
        ConfigError: there are none.
    """
    found = [path for name in FOLDERS for path in (*steps.named(run / name), *steps.damaged(run / name))]
    if not found and (run / MANIFEST).exists():
        found = [run]
    if not found:
        raise ConfigError(f"{run} has no checkpoints; give the folder of a run, or of one checkpoint")
    return found


def listed(paths: Iterable[Path], *, hashed: bool) -> Iterator[Line]:
    """Yields what is known of each checkpoint. Reads all bytes if `hashed`, else compares sizes only."""
    for path in paths:
        inside = list(path.iterdir()) if path.is_dir() else [path]
        when = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
        size = sum(file.stat().st_size for file in inside)
        step, problem = -1, None
        try:
            found = Checkpoint(path)
            step = found.step
            problems = (damage_of(path / stored.name, stored, hashed=hashed) for stored in found.files)
            problem = next((text for text in problems if text), None)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        yield Line(path, step, size, len(inside), when, problem)


def differences(one: Path, other: Path) -> Iterator[str]:
    """Yields a line for each setting that differs between two checkpoints, and for each kind of tensors how much.

    Raises:
        CheckpointError: one is damaged.
    """
    first, second = Checkpoint(one), Checkpoint(other)
    if first.step != second.step:
        yield f"step: {first.step} and {second.step}"
    yield from _values(first.extra, second.extra, "")
    only = first.tensors.keys() ^ second.tensors.keys()
    if only:
        yield f"{len(only)} tensors are in one of them only, such as {min(only)}"
    for kind in sorted({name.partition(".")[0] for name in first.tensors.keys() & second.tensors.keys()}):
        before, after = first.full(f"{kind}."), second.full(f"{kind}.")
        shared = [name for name in before if name in after and before[name].shape == after[name].shape]
        apart = [float((before[name] - after[name]).abs().max()) for name in shared if before[name].numel()]
        changed = sum(1 for each in apart if each)
        squares = [(before[name] - after[name]).square().sum() for name in shared]
        total = torch.stack([before[name].square().sum() for name in shared]).sum().sqrt()
        relative = float(torch.stack(squares).sum().sqrt() / total.clamp(min=torch.finfo(total.dtype).tiny))
        worst = max(apart, default=0.0)
        yield f"{kind}: {changed} of {len(apart)} tensors differ, by {worst:.3g} at most; relative norm {relative:.3g}"


def _values(one: Any, other: Any, name: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _values(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield f"{name}: {one} and {other}"


def remove(run: Path, numbers: Iterable[int]) -> list[Path]:
    """Removes the checkpoints of these steps, and returns their paths.

    Raises:
        ConfigError: one isn't there, or it is the newest, from which the run goes on.
    """
    folder = run / "checkpoints"
    wanted = [steps.path_of(folder, number) for number in numbers]
    for path in wanted:
        if path not in steps.named(folder):
            there = ", ".join(str(steps.step_of(each)) for each in steps.named(folder)) or "none"
            raise ConfigError(f"{path} doesn't exist; the steps in {folder} are {there}")
        if path == steps.newest(folder):
            raise ConfigError(f"{path} is the newest, from which the run goes on; remove older ones")
    for path in wanted:
        steps.remove(path)
    return wanted

"""The folder of a run's checkpoints: which there are, which is removed, what is set aside. Knows no tensors.

`step-00001000` is a checkpoint, `damaged-step-00001000` was one, and what begins with a dot isn't finished.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from itertools import count
from pathlib import Path

from ijepa_scale.checkpoint.manifest import MANIFEST
from ijepa_scale.new_file import flush

_NAME = re.compile(r"step-(\d{8,18})")
_UNFINISHED, _REPLACED, _DAMAGED = ".unfinished-", ".replaced-", "damaged-"


def path_of(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def unfinished_path_of(folder: Path, step: int) -> Path:
    """Returns the path under which the checkpoint of a step is written."""
    return folder / f"{_UNFINISHED}{path_of(folder, step).name}"


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def named(folder: Path) -> list[Path]:
    """Returns all that is named like a checkpoint, whatever it is, in the order of the steps."""
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """Returns the checkpoint of the highest step that has a manifest, or None if there is none."""
    return next((path for path in reversed(named(folder)) if (path / MANIFEST).is_file()), None)


def damaged(folder: Path) -> list[Path]:
    """Returns what was set aside."""
    return sorted(folder.glob(f"{_DAMAGED}step-*"))


def set_aside(path: Path) -> Path:
    """Renames what is no checkpoint, so that it is never read or removed again, and returns its new path."""
    names = (path.with_name(f"{_DAMAGED}{path.name}{suffix}") for suffix in _suffixes())
    aside = next(name for name in names if not os.path.lexists(name))
    os.replace(path, aside)
    flush(path.parent)
    return aside


def put(unfinished: Path, final: Path) -> None:
    """Gives a complete checkpoint its name. If that exists, one of the two is whole at every moment."""
    old = final.with_name(f"{_REPLACED}{final.name}")
    if os.path.lexists(final):
        _delete(old)
        os.replace(final, old)
    try:
        os.replace(unfinished, final)
    except OSError:
        recover(final.parent)
        raise
    flush(final.parent)
    with contextlib.suppress(OSError):  # the new one is in its place; `recover` deletes what is left
        _delete(old)


def recover(folder: Path) -> None:
    """Undoes a replacement that a kill has interrupted. Only for the run that holds the folder."""
    for old in folder.glob(f"{_REPLACED}step-*"):
        final = old.with_name(old.name.removeprefix(_REPLACED))
        if os.path.lexists(final):
            _delete(old)
        else:
            os.replace(old, final)


def prune(folder: Path, keep: int, written: Path, *, keep_every: int = 0) -> None:
    """Removes all but the `keep` newest checkpoints and those of multiples of `keep_every`, if that isn't 0.

    Keeps `written` too, even if others have later steps.
    """
    for path in [path for path in named(folder) if (path / MANIFEST).is_file()][:-keep]:
        if path != written and not (keep_every and step_of(path) % keep_every == 0):
            remove(path)
    for path in folder.glob(f"{_UNFINISHED}*"):
        _delete(path)


def remove(path: Path) -> None:
    """Renames a checkpoint and then removes it, so that a kill leaves no incomplete one under its name."""
    hidden = path.with_name(f"{_UNFINISHED}removed-{path.name}")
    _delete(hidden)
    os.replace(path, hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _suffixes() -> map[str]:
    return map(lambda number: f"-{number}" if number else "", count())

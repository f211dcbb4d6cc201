"""Writes files and folders under a temporary name and renames them, so that what has its final name is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ijepa_scale.errors import CheckpointError
from ijepa_scale.new_file import check_replaceable


def write_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Calls `write` with a temporary file of the same folder and suffix, renames it to `path`, and returns that.

    Files that `write` puts next to it, with its name and more, are renamed alike, before the file itself. After an
    error nothing is left.

    Raises:
        CheckpointError: it can't be written.
    """

    def inside(folder: Path) -> None:
        write(folder / path.name)
        _open_up(folder)
        check_replaceable(path)
        others = sorted(found for found in folder.iterdir() if found.name != path.name)
        for found in (*others, folder / path.name):
            os.replace(found, path.with_name(found.name))

    return _with_temporary(path, inside)


def write_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Calls `write` with a temporary folder, renames it to `path`, and returns that.

    A folder that is there already is replaced if it holds no other files than the new one. After an error it is as
    before, and nothing else is left.

    Raises:
        CheckpointError: it can't be written, or the old one holds other files.
    """

    def inside(folder: Path) -> None:
        new = folder / path.name
        new.mkdir()
        write(new)
        _open_up(new)
        if path.is_dir() and (strange := sorted({f.name for f in path.iterdir()} - {f.name for f in new.iterdir()})):
            raise CheckpointError(f"{path} holds {strange[0]}, which isn't of this export; name another folder")
        if path.exists():
            os.replace(path, folder / f"old-{path.name}")
        os.replace(new, path)

    return _with_temporary(path, inside)


def _open_up(folder: Path) -> None:
    """Gives files the permissions that new files have here: some writers leave them to their owner alone."""
    for file in folder.iterdir():
        file.chmod(folder.stat().st_mode & 0o666)


def _with_temporary(path: Path, write: Callable[[Path], object]) -> Path:
    path = path if path.name else path.resolve()
    temporary = path.with_name(f".unfinished-{path.name}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)  # left by an export that was killed
        temporary.mkdir()
        write(temporary)
    except OSError as error:
        raise CheckpointError(f"{path} can't be written ({error}); free space, or name another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path

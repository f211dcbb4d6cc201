"""Tells whether others than this user can change files that this process trusts."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ijepa_scale.errors import DataError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_MODE = 0o755  # of folders made here; with the default mode and a umask of 002, the group could write


def make_private(folder: Path) -> None:
    """Makes a folder, unless it is there, and checks it; see `check_private`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=_MODE, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Checks that only this user, or root, can put files into a folder. Folders around it aren't checked.

    Raises:
        DataError: others can.
    """
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise DataError(
            f"folder {folder} belongs to user {status.st_uid}, who could change what this run (user {os.geteuid()}) "
            "reads from it; name a folder of your own"
        )
    if status.st_mode & _OTHERS:
        raise DataError(
            f"folder {folder} has mode {stat.S_IMODE(status.st_mode):o}, so others could change what this run reads "
            f"from it; remove what you don't know there and take their rights (chmod go-w {folder}), or name another"
        )


def is_private(status: os.stat_result) -> bool:
    """Returns whether only this user, or root, can write to the file or folder with this status."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & _OTHERS


__all__ = ["check_private", "is_private", "make_private"]

"""Reads a small file whole, and never waits for a pipe or a device that has its name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # in case a pipe takes the file's place meanwhile

_LARGEST = 1 << 30  # bytes; a file without content can say that it is larger than the memory


def read_regular(path: str | Path) -> bytes:
    """Returns the content of a regular file of at most 1 GiB.

    Raises:
        OSError: it can't be read, or is something else.
    """
    check_regular(path)
    descriptor = os.open(path, _FLAGS)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check(status.st_mode, path)
        if status.st_size > _LARGEST:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes are too many", str(path))
        return file.read()


def check_regular(path: str | Path) -> None:
    """Checks that a path leads to a regular file.

    Raises:
        OSError: it doesn't.
    """
    _check(os.stat(path).st_mode, path)


def _check(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


__all__ = ["check_regular", "read_regular"]

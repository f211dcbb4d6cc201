"""Writes a file so that what has its final name is complete, and errors of the disk name it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_CODE = re.compile(r"\(os error (\d+)\)")  # how safetensors passes on the error of a call


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Makes the folder, yields a temporary path in it for the caller to write, and renames that to `path` at the end.

    The file gets the permissions that the user's umask gives to new files, also from writers that leave it to its
    owner alone, as safetensors does. After an error nothing is left. What a link leads to is replaced, and the link
    stays.

    Raises:
        OSError: it can't be written, or something other than a file is there; names the file.
    """
    path = Path(path)
    check_replaceable(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = path.with_name(f".unfinished-{path.name}")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _usual_mode(temporary):
                yield temporary
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _usual_mode(path: Path) -> Iterator[None]:
    """Makes an empty file, which the caller replaces or fills, and gives what is there then the mode that it had.

    That is what the umask and the folder's access list give to a new file: reading the umask would change it for all
    threads.
    """
    path.unlink(missing_ok=True)  # of a run that was killed
    path.touch(exist_ok=False)
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


def check_replaceable(path: Path) -> None:
    """Checks that nothing is at a path, or a file.

    Raises:
        OSError: a folder, a device or a pipe is there, or what a link leads to is one.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is a device or a pipe, which no file may replace", str(path))


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Names a file or folder in errors of the disk that name none, and makes those of safetensors an `OSError`.

    Raises:
        OSError: what the caller does raises one.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and " requested and " in str(error):  # NumPy's, when a write ends early
            error.errno, error.strerror = errno.ENOSPC, os.strerror(errno.ENOSPC)
        if error.errno in _OF_DISKS and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _CODE.search(str(error)) if type(error).__name__ == "SafetensorError" else None
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


class PatientFile(io.RawIOBase):
    """A file for writers that end the process, or hide the reason, when a write fails: it fails when it is left."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._problem: OSError | None = None

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, data: Any) -> int:
        """Writes all of the data, unless a write has failed before, and returns the number of their bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self._problem is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._problem = error
        return size

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place, and returns it."""
        return self._file.seek(offset, whence)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._problem is not None:
            raise self._problem


def flush(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["PatientFile", "check_replaceable", "flush", "named", "new_file"]

"""Reads the bytes of one image file, and never waits for a pipe or a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ijepa_scale.data.sources.scan import MAX_MEMBER_BYTES
from ijepa_scale.errors import DataError, SampleError

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # ELOOP: a link to itself
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # in case a pipe takes the file's place meanwhile


def read_image_file(path: str | Path) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        SampleError: it doesn't exist, isn't a regular file, is empty, or is too large for a shard.
        DataError: it can't be read.
    """
    try:
        _check_regular(os.stat(path))
        descriptor = os.open(path, _FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            _check_regular(status)
            check_size(status.st_size)
            return file.read(status.st_size)
    except OSError as error:
        if error.errno in _MISSING:
            raise SampleError(
                "there is no such file, or it is a broken link; fetch it, correct the path or drop it", "missing file"
            ) from None
        raise DataError(f"image {path} can't be read ({error.strerror}); check its permissions and the disk") from None


def check_size(size: int) -> None:
    """Checks that an image isn't empty or too large for a shard.

    Raises:
        SampleError: it is.
    """
    if not 0 < size <= MAX_MEMBER_BYTES:
        raise SampleError(f"{size} bytes; give 1 to {MAX_MEMBER_BYTES} (64 MiB)", "image size")


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("not a regular file; replace or drop it", "no regular file")


__all__ = ["check_size", "read_image_file"]

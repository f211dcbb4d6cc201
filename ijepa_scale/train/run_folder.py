"""The folder of a run: made and checked before anything is built, and kept from other runs until the end."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ijepa_scale import environment
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.new_file import named

logger = logging.getLogger(__name__)

LOCK = ".lock"  # exists while a run uses the folder; holds its process and host
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it. Communicates, so every process must enter.

    The lock ends with the process that holds it, however that ends. Warns where the file system has no locks.

    Raises:
        ConfigError: the folder can't be made or written, or another run uses it; raised on every process.
    """
    is_new = not os.path.lexists(folder)
    descriptor, problem = _take(folder) if world.is_main else (None, None)
    problem = world.broadcast_object(problem)  # type: ignore[assignment]
    if problem is not None:
        raise ConfigError(problem)
    try:
        with named(folder):
            yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # before the lock ends, so that no other run's file is removed
                if is_new:
                    folder.rmdir()  # of a run that failed before it wrote anything; it fails where something is inside
            os.close(descriptor)


def _take(folder: Path) -> tuple[int | None, str | None]:
    """Returns the open lock file, or what is wrong."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _TAKEN:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                    os.close(descriptor)
                    return None, f"folder {folder} is in use by {holder}; wait for it, or set another folder"
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s can't be locked (%s): start no second run in it", folder, error.strerror)
            if _is(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _holder().encode(), 0)
                return descriptor, None
            os.close(descriptor)  # the run that held it has just removed the file
    except OSError as error:
        return None, (
            f"folder {folder} can't be used ({error.strerror}: {error.filename or path}); set folder to one that can "
            "be made and written, or free space"
        )


def _holder() -> str:
    """Returns who holds the folder, and since when."""
    job = environment.job()
    since = datetime.datetime.now().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{f' (job {job})' if job else ''} since {since}"


def _is(path: Path, descriptor: int) -> bool:
    """Returns whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False

"""The folder of a run: made and checked before anything is built, and kept from other runs until the end."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ijepa_scale import environment
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.new_file import named

logger = logging.getLogger(__name__)

LOCK = ".lock"  # exists while a run uses the folder; holds its process and host
_SHOWS_S = 60.0  # that a network file system may take to show a new file. Source: acdirmax of nfs(5)
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
    _check_shared(folder, world)
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


def _check_shared(folder: Path, world: World) -> None:
    """Checks that all processes see the lock that process 0 has just written. Communicates.

    Raises:
        ConfigError: some don't, so the folder is another one for them; raised on every process.
    """
    if world.size == 1:
        return
    own = (folder / LOCK).read_text() if world.is_main else None
    expected, deadline = world.broadcast_object(own), time.monotonic() + _SHOWS_S
    while not (sees := _reads(folder / LOCK) == expected) and time.monotonic() < deadline:
        time.sleep(0.1)
    found: list[Any] = world.gather_objects((sees, str(folder)))
    blind = [member for member, (saw, _) in zip(world.members, found, strict=True) if not saw]
    if blind:
        first, more = blind[0], f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise ConfigError(
            f"{first}{more} can't see in folder {found[first.rank][1]} what process 0 on {world.members[0].host} has "
            f"written into {found[0][1]}; set folder to one that all hosts share"
        )


def _reads(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


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

"""A bounded folder of fetched files, shared by all processes of a machine.

Each entry has a lock file. Readers of the entry hold a shared lock; a process that fetches or removes it holds an
exclusive one. A process that dies releases its locks. So one process fetches while the others wait, and a file in
use is never removed. A file gets its final name only when it is complete. Only this
user may be able to write to the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ijepa_scale.data.sources.fetch import Retry, fetch, remote_size, shown
from ijepa_scale.data.sources.private import is_private, make_private
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

_PART = ".part"  # an empty (sparse) file of the reserved size
_NEW = ".new"  # the bytes received so far
_LOCK = ".lock"
_GIB = 1 << 30
_POLL_S = 0.2


@dataclass(frozen=True)
class RemoteFile:
    """The address of a remote file, with its size and hash if they are known."""

    url: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass
class Handle:
    """An open file. A file of the cache has a lock, and isn't removed before `close`."""

    descriptor: int
    lock: int | None = None

    def close(self) -> None:
        """Closes the file and releases its lock."""
        os.close(self.descriptor)
        if self.lock is not None:
            os.close(self.lock)


class FileCache:
    """Keeps at most `max_bytes` of files in `folder`; removes the least recently opened ones first.

    May be pickled and forked, because it holds no open file itself.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int, retry: Retry | None = None, *, wait_s: float = 600.0
    ) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.retry = retry or Retry()
        self._wait_s = wait_s  # how long to wait for room while all files are in use
        make_private(self.folder)

    def path(self, url: str) -> Path:
        """Returns the path of a cached file; different addresses never share one, even if they end alike."""
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rstrip('/').rpartition('/')[2]}"

    def open(self, file: RemoteFile) -> Handle:
        """Returns the open file, after fetching it if it isn't cached; other processes that want it wait meanwhile.

        Raises:
            DataError: it can't be fetched, or there is no room for it.
        """
        path = self.path(file.url)
        while True:
            lock = os.open(f"{path}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    if is_private(os.fstat(descriptor)):
                        os.utime(path)
                        return Handle(descriptor, lock)
                    os.close(descriptor)
                    logger.warning("%s: other users can write to this cached file, so it is fetched again", path)
                    path.unlink(missing_ok=True)
                # given back first: on NFS, two processes that raise a shared lock wait for each other for ever
                fcntl.flock(lock, fcntl.LOCK_UN)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._fetch(file, path)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # another process may remove the file before the next round, so check again

    def discard(self, url: str, seen: os.stat_result) -> None:
        """Removes a cached file that turned out to be damaged, if it is still the one that was seen."""
        path = self.path(url)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), seen):
                path.unlink()

    def has(self, url: str) -> bool:
        """Returns whether a file is cached."""
        return self.path(url).exists()

    def _fetch(self, file: RemoteFile, path: Path) -> None:
        """Fetches a file; the caller holds its lock."""
        size = remote_size(file.url, self.retry) if file.size is None else file.size
        part, new = (path.with_name(path.name + suffix) for suffix in (_PART, _NEW))
        self._reserve(part, size, file.url)
        try:
            fetch(file.url, new, size=size, sha256=file.sha256, retry=self.retry, largest=size)
            os.chmod(new, os.stat(new).st_mode & 0o644)  # the umask may let the group write
            os.replace(new, path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, url: str) -> None:
        """Makes room for `size` bytes and reserves them."""
        if size > self.max_bytes:
            raise DataError(
                f"{shown(url)} has {size / _GIB:.2f} GiB, the cache only {self.max_bytes / _GIB:.2f}; raise "
                "data.cache_gb"
            )
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._locked():
                free = self.max_bytes - self._used(part)
                for entry in self._oldest_first() if free < size else ():
                    free += self._remove(entry)
                    if free >= size:
                        break
                if free >= size:
                    with part.open("wb") as hole:
                        hole.truncate(size)  # a sparse file: counted from now on, but uses no disk yet
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"the cache {self.folder} of {self.max_bytes / _GIB:.2f} GiB is full of files in use, and "
                    f"{shown(url)} needs {size / _GIB:.2f} GiB; raise data.cache_gb, or lower data.window_shards"
                )
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock on the folder's accounting."""
        lock = os.open(self.folder / f"room{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _used(self, mine: Path) -> int:
        """Returns the bytes used or reserved, except those in `mine`; removes transfers whose process has died."""
        total = 0
        for entry in self._entries():
            if entry.name.endswith(_PART):
                if entry == mine or self._remove(entry):
                    continue
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
        return total

    def _entries(self) -> list[Path]:
        return [entry for entry in self.folder.iterdir() if entry.is_file() and entry.suffix not in (_LOCK, _NEW)]

    def _oldest_first(self) -> list[Path]:
        whole = [entry for entry in self._entries() if not entry.name.endswith(_PART)]
        return sorted(whole, key=lambda entry: entry.stat().st_mtime_ns)

    def _remove(self, entry: Path) -> int:
        """Removes an entry and returns the bytes freed; 0 if a process is using or fetching it."""
        name = entry.name.removesuffix(_PART)
        lock = os.open(self.folder / f"{name}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = entry.stat().st_size
            entry.unlink()
            (self.folder / f"{name}{_NEW}").unlink(missing_ok=True)  # left by a transfer that died
            return max(1, size)
        except (BlockingIOError, FileNotFoundError):
            return 0
        finally:
            os.close(lock)

"""A bounded folder of fetched files, shared by all processes of a machine.

Each entry has a lock file: who reads the entry holds it shared, who fetches or removes it exclusively; a process
that dies lets go. So one process fetches while the others wait, and what is in use is never removed. A file
appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ijepa_scale.data.sources.fetch import Retry, fetch, remote_size
from ijepa_scale.errors import DataError

_PART = ".part"  # an empty file of the size that is reserved
_NEW = ".new"  # what has come so far
_LOCK = ".lock"
_GIB = 1 << 30
_POLL_S = 0.2


@dataclass(frozen=True)
class RemoteFile:
    """A file somewhere else, and what is known of it."""

    url: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass
class Handle:
    """An open file of the cache (or elsewhere: without a lock); it isn't removed before `close`."""

    descriptor: int
    lock: int | None = None

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self.descriptor)
        if self.lock is not None:
            os.close(self.lock)


class FileCache:
    """Files of at most `max_bytes` together in `folder`; the least recently opened are removed first.

    May be pickled and forked: it holds no open file itself.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int, retry: Retry | None = None, *, wait_s: float = 600.0
    ) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.retry = retry or Retry()
        self._wait_s = wait_s  # for room, while all files are in use
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, url: str) -> Path:
        """Returns where a file lies when it is here: equal last names of different addresses don't collide."""
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rstrip('/').rpartition('/')[2]}"

    def open(self, file: RemoteFile) -> Handle:
        """Returns the open file, fetching it where it isn't here; others who want it wait meanwhile.

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
                    os.utime(path)
                    return Handle(descriptor, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._fetch(file, path)
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # between here and the next round it may be removed again, so look again

    def has(self, url: str) -> bool:
        """Returns whether a file is here."""
        return self.path(url).exists()

    def _fetch(self, file: RemoteFile, path: Path) -> None:
        """Fetches a file whose lock is held."""
        size = remote_size(file.url, self.retry) if file.size is None else file.size
        part, new = (path.with_name(path.name + suffix) for suffix in (_PART, _NEW))
        self._reserve(part, size, file.url)
        try:
            fetch(file.url, new, size=size, sha256=file.sha256, retry=self.retry, largest=size)
            os.replace(new, path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, url: str) -> None:
        """Makes room for `size` bytes and marks them as taken."""
        if size > self.max_bytes:
            raise DataError(
                f"{url} has {size / _GIB:.2f} GiB, the cache {self.max_bytes / _GIB:.2f}; raise data.cache_gb"
            )
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._alone():
                free = self.max_bytes - self._used(part)
                for entry in self._oldest_first() if free < size else ():
                    free += self._remove(entry)
                    if free >= size:
                        break
                if free >= size:
                    with part.open("wb") as hole:
                        hole.truncate(size)  # counted from now on; takes no room yet
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"the cache {self.folder} of {self.max_bytes / _GIB:.2f} GiB is full of files in use, and {url} "
                    f"needs {size / _GIB:.2f} GiB; raise data.cache_gb, or lower data.window_shards"
                )
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock on the folder's book-keeping."""
        lock = os.open(self.folder / f"room{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _used(self, mine: Path) -> int:
        """Returns the bytes taken or reserved; a transfer whose process has died is removed."""
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
        """Returns the bytes that removing an entry freed; 0 where somebody uses or fetches it."""
        name = entry.name.removesuffix(_PART)
        lock = os.open(self.folder / f"{name}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = entry.stat().st_size
            entry.unlink()
            (self.folder / f"{name}{_NEW}").unlink(missing_ok=True)  # of a transfer that died
            return max(1, size)
        except (BlockingIOError, FileNotFoundError):
            return 0
        finally:
            os.close(lock)

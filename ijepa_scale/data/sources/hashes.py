"""Compares shards with the SHA-256 of their manifest, once per run and machine. Knows nothing of samples.

A process that has hashed a shard leaves a note of the result in a folder of this user, under the shard's lock. Other
processes take it instead of hashing the shard again, if it was written after their run was opened: an earlier one says
nothing of what the disk holds now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ijepa_scale.data.sources.private import is_private
from ijepa_scale.data.work_signs import show_work

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_LOOK_S = 0.02  # between two looks at a shard that another process hashes
Identity = tuple[int, ...]  # of a file's content, by its status


class HashedShards:
    """The results of one run. May be pickled and forked."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"ijepa-scale-{os.geteuid()}" / "hashed"
        self._opened_at = time.time()
        self._known: dict[tuple[str, Identity], bool] = {}  # by path and identity, of this process

    def matches(self, path: Path, descriptor: int, identity: Identity, sha256: str) -> bool:
        """Returns whether the open file has this hash; reads it whole, unless that was done in this run.

        Waits for another process that does so.

        Raises:
            OSError: it can't be read.
        """
        known = self._known.get((str(path), identity))
        if known is None:
            known = self._settle(path, descriptor, identity, sha256, wait=True)
            assert known is not None
        return known

    def hash_ahead(self, path: Path, descriptor: int, identity: Identity, sha256: str) -> None:
        """Hashes a file that will be read, unless that was done or another process does it."""
        if (str(path), identity) not in self._known:
            self._settle(path, descriptor, identity, sha256, wait=False)

    def accept(self, path: Path, identity: Identity, sha256: str) -> None:
        """Notes that a file has this hash, without reading it."""
        self._known[str(path), identity] = True
        with self._note(path, wait=True) as (note, _):
            if note is not None:
                self._write(note, _facts(path, identity, sha256), same=True)

    def _settle(self, path: Path, descriptor: int, identity: Identity, sha256: str, *, wait: bool) -> bool | None:
        facts = _facts(path, identity, sha256)
        with self._note(path, wait=wait) as (note, taken):
            if taken:
                return None
            known = None if note is None else self._noted(note, facts)
            if known is None:
                known = self._hash(descriptor, note, wait=wait) == sha256
                if note is not None:
                    self._write(note, facts, same=known)
            self._known[str(path), identity] = known
            return known

    @contextlib.contextmanager
    def _note(self, path: Path, *, wait: bool) -> Iterator[tuple[int | None, bool]]:
        """Yields the open and locked note of a shard, None if there can't be one, and whether another process has it.

        Waits until no other process has it, if so wished.
        """
        note, taken = None, False
        try:
            note = self._open_note(path)
            while taken := not _locked(note):
                if not wait:
                    break
                self._wait(note)
        except OSError as error:
            _say_once(
                f"what was found about shards can't be noted in {self._folder} ({error.strerror or error}), so each "
                "process hashes every shard itself; set TMPDIR to a folder of a local disk that only you can write to"
            )
            if note is not None:
                os.close(note)
            note = None
        try:
            yield note, taken
        finally:
            if note is not None:
                os.close(note)

    def _wait(self, note: int) -> None:
        """Waits a moment, and shows work if the process that has the note hashes."""
        before = os.fstat(note).st_mtime_ns
        time.sleep(_LOOK_S)
        if os.fstat(note).st_mtime_ns != before:
            show_work()

    def _open_note(self, path: Path) -> int:
        """Returns the open note of a shard.

        Raises:
            OSError: it can't be opened, or others than this user can write to its folder.
        """
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not is_private(os.lstat(folder)):
                raise PermissionError(errno.EACCES, f"other users can write to {folder}")
        name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _hash(self, descriptor: int, note: int | None, *, wait: bool) -> str:
        """Returns the SHA-256 of an open file. Shows work if this process's item waits for it."""
        if note is not None:
            try:
                os.ftruncate(note, 0)  # an earlier result must not look new
            except OSError:
                note = None
        digest, offset = hashlib.sha256(), 0
        while chunk := os.pread(descriptor, _CHUNK, offset):
            digest.update(chunk)
            offset += len(chunk)
            if wait:
                show_work()
            if note is not None:
                with contextlib.suppress(OSError):  # others then see no work
                    os.utime(note)
        return digest.hexdigest()

    def _write(self, note: int, facts: bytes, *, same: bool) -> None:
        with contextlib.suppress(OSError):  # a full disk: others hash it too
            os.ftruncate(note, 0)
            os.pwrite(note, facts + (b"same" if same else b"differs"), 0)

    def _noted(self, note: int, facts: bytes) -> bool | None:
        status = os.fstat(note)
        if status.st_mtime < self._opened_at:
            return None
        content = os.pread(note, status.st_size, 0)
        start, _, result = content.rpartition(b"\n")
        if start + b"\n" != facts:
            return None
        return {b"same": True, b"differs": False}.get(result)


def _facts(path: Path, identity: Identity, sha256: str) -> bytes:
    return os.fsencode(f"{os.path.abspath(path)}\n{identity}\n{sha256}\n")


def _locked(note: int) -> bool:
    """Locks a note, and returns whether no other process has it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _say_once(what: str) -> None:
    if what not in _said:
        _said.append(what)
        logger.warning("%s", what)


_said: list[str] = []  # by this process

__all__ = ["HashedShards", "Identity"]

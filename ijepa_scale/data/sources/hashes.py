"""Compares shards with the SHA-256 of their manifest, once per run and machine. Knows nothing of samples.

A process that has hashed a shard leaves a note of the result in a folder of this user, under the shard's lock. Other
processes take it instead of hashing the shard again, if it was written after their run was opened: an earlier one says
nothing of what the disk holds now.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

from ijepa_scale.data.sources.private import is_private

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
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
        note = self._open_note(path)
        if note is not None:
            fcntl.flock(note, fcntl.LOCK_EX)
            self._write(note, _facts(path, identity, sha256), same=True)
            os.close(note)

    def _settle(self, path: Path, descriptor: int, identity: Identity, sha256: str, *, wait: bool) -> bool | None:
        facts = _facts(path, identity, sha256)
        note = self._open_note(path)
        try:
            if note is not None:
                try:
                    fcntl.flock(note, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    return None
                known = self._noted(note, facts)
                if known is not None:
                    self._known[str(path), identity] = known
                    return known
            known = _sha256_of(descriptor) == sha256
            self._known[str(path), identity] = known
            if note is not None:
                self._write(note, facts, same=known)
            return known
        finally:
            if note is not None:
                os.close(note)

    def _open_note(self, path: Path) -> int | None:
        """Returns the open note of a shard; None if this user has no folder for it that only they can write to."""
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                if not is_private(os.lstat(folder)):
                    raise PermissionError(0, f"others can write to {folder}")
            name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            return os.open(self._folder / name, flags, 0o600)
        except OSError as error:
            logger.debug("every process hashes %s itself (%s)", path, error)
            return None

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


def _sha256_of(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


__all__ = ["HashedShards", "Identity"]

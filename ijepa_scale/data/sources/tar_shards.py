"""Reads samples from tar shards in local files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.sources.cache import Handle
from ijepa_scale.data.sources.class_list import CLASSES, number_labels, read_classes
from ijepa_scale.data.sources.hashes import HashedShards, Identity
from ijepa_scale.data.sources.lost_shards import problems_of, usable_shards
from ijepa_scale.data.sources.scan import Members, Problems
from ijepa_scale.data.sources.shard_manifest import MANIFEST, ShardRow
from ijepa_scale.data.sources.tar_index import ShardIndex
from ijepa_scale.errors import DataError, ShardError
from ijepa_scale.plurals import counted

_OPEN_FILES = 64


class ShardSource:
    """The samples of indexed tar shards in local files, held against their manifest if there is one.

    `pattern` is the folder or the glob that has named the shards: of others that it means, the manifest may count the
    samples. If `hashed`, each shard is compared with its SHA-256 in the manifest when a process first opens it.
    """

    def __init__(
        self,
        paths: list[Path],
        members: Members | None = None,
        *,
        pattern: str | Path | None = None,
        hashed: bool = True,
    ) -> None:
        if not paths:
            raise DataError("the list of shards is empty; name a folder of shards, a glob or a brace pattern")
        shards, self._rows, self._lost = usable_shards(paths, members, pattern)
        self._hashed = HashedShards() if hashed else None
        self._take(shards, [shard.path.name for shard in shards])
        self._name_classes(_the_list(paths), str(paths[0].parent / CLASSES))

    def _take(self, shards: list[ShardIndex], names: list[str]) -> None:
        """Numbers the samples of these shards. `names` don't depend on the folder that the shards are in."""
        self._shards = shards
        if not any(len(shard) for shard in shards):
            raise DataError(f"no shard holds a sample that can be read: {self.problems().summary()}")
        self.shard_sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.fingerprint = _shard_fingerprint(shards, names)
        self._ends = np.cumsum(self.shard_sizes)
        self._files: OrderedDict[int, Handle] = OrderedDict()  # by shard, opened by this process

    def files(self) -> list[Path]:
        """Returns the paths of the shards."""
        return [shard.path for shard in self._shards]

    @property
    def has_text_labels(self) -> bool:
        """Whether labels are class names, which a list of classes must number."""
        return any(shard.texts for shard in self._shards)

    def number_by(self, classes: list[str], origin: str) -> None:
        """Numbers labels that are class names by their positions in `classes`, which messages call `origin`."""
        self._name_classes(classes, origin)

    def _name_classes(self, classes: list[str] | None, origin: str) -> None:
        """Sets the class names, and numbers the labels that are names by them."""
        self.classes: list[str] | None = classes
        numbered = number_labels(self._shards, classes, origin)
        self._labels, self._label_fault = numbered.labels, numbered.fault

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for handle in getattr(self, "_files", {}).values():
            handle.close()

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            ShardError: the tar has gone, or isn't the same as when it was indexed, or differs from its manifest.
            DataError: it can't be read.
        """
        shard, row = self._locate(sample_id)
        index = self._shards[shard]
        size = int(index.sizes[row])
        try:
            data = os.pread(self._file(shard), size, int(index.offsets[row]))
            self._check_same(index)  # after reading, so that what was read is from before any change
        except ShardError:
            self._close(shard)
            raise
        except OSError as error:
            raise DataError(f"shard {self._title(shard)} can't be read ({error.strerror}); check the disk") from None
        if len(data) != size:
            self._close(shard)
            raise changed_shard(self._title(shard), "it ends before its last sample does")
        return data

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 if there is none, or if it is a name and no list of classes numbers it."""
        shard, row = self._locate(sample_id)
        return int(self._labels[shard][row])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there is none.

        Raises:
            DataError: labels are names and no list of classes numbers all of them.
        """
        if self._label_fault is not None:
            raise DataError(self._label_fault)
        return np.concatenate(self._labels).astype(np.int64)

    def name(self, sample_id: int) -> str:
        """Returns the tar's path and the sample's key."""
        shard, row = self._locate(sample_id)
        return f"{self._shards[shard].path}:{self._shards[shard].keys[row]}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Makes the system read the shards into its page cache, in the background."""
        paths = [self._shards[int(shard)].path for shard in [*now, *soon]]
        rows = {path: self._rows[path] for path in paths[len(now) :] if path in self._rows}
        threading.Thread(target=_read_ahead, args=(paths, rows, self._hashed), daemon=True).start()

    def summary(self) -> str:
        """Returns the number of images and shards, for the log."""
        return f"{counted(self.num_samples, 'image')} in {counted(len(self.shard_sizes), 'shard')}"

    def problems(self) -> Problems:
        """Returns what can't be used, including the samples that shards lack according to their manifest."""
        return problems_of(self._shards, self._rows, self._lost)

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """Returns the shard of a sample and its row in the shard's index."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is not among {self.num_samples}; give 0 to {self.num_samples - 1}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, int(sample_id - (self._ends[shard] - self.shard_sizes[shard]))

    def _file(self, shard: int) -> int:
        """Returns an open file descriptor of a shard; closes the least recently used one if too many are open."""
        if shard not in self._files:
            self._files[shard] = self._open(shard)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard].descriptor

    def _close(self, shard: int) -> None:
        handle = self._files.pop(shard, None)
        if handle is not None:
            handle.close()

    def _open(self, shard: int) -> Handle:
        """Returns the open shard, after comparing it with its manifest.

        Raises:
            ShardError: it isn't the shard that was indexed.
            OSError: it can't be read.
        """
        index = self._shards[shard]
        self._check_same(index)
        handle = Handle(os.open(index.path, os.O_RDONLY | os.O_CLOEXEC))
        row = self._rows.get(index.path)
        try:
            if row is not None and self._hashed is not None and row.bytes == index.tar_bytes:
                identity = identity_of(os.fstat(handle.descriptor))
                if not self._hashed.matches(index.path, handle.descriptor, identity, row.sha256):
                    raise differing_shard(str(index.path))
        except BaseException:
            handle.close()
            raise
        return handle

    def _check_same(self, index: ShardIndex) -> None:
        """Raises `ShardError` if a shard isn't the one that was indexed."""
        try:
            status = os.stat(index.path)
        except FileNotFoundError:
            raise ShardError(
                f"shard {index.path} has gone since it was indexed; put it back, or start again without it",
                "missing shard",
                str(index.path),
            ) from None
        if status.st_size != index.tar_bytes:
            raise changed_shard(str(index.path), f"{status.st_size} bytes instead of {index.tar_bytes}")
        if status.st_mtime_ns != index.tar_mtime_ns:
            raise changed_shard(str(index.path), "written at another time")

    def _title(self, shard: int) -> str:
        """Returns what messages call a shard."""
        return str(self._shards[shard].path)


def identity_of(status: os.stat_result) -> Identity:
    """Returns what changes with the content of a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def changed_shard(shard: str, how: str) -> ShardError:
    """Returns the error for a shard that was written to after it was indexed."""
    return ShardError(
        f"shard {shard} has changed since it was indexed ({how}); put it back as it was, or start again with it",
        "changed shard",
        shard,
    )


def differing_shard(shard: str) -> ShardError:
    """Returns the error for a shard whose hash isn't that in its manifest."""
    return ShardError(
        f"shard {shard} differs from {MANIFEST} in its SHA-256, so it was damaged or replaced; copy or make it again",
        "changed shard",
        shard,
    )


def _the_list(paths: list[Path]) -> list[str] | None:
    """Returns the class list next to the shards; None without one."""
    found = {path: read_classes(path.parent) for path in sorted({path.parent / CLASSES for path in paths})}
    lists = {path: names for path, names in found.items() if names is not None}
    if not lists:
        return None
    first, classes = next(iter(lists.items()))
    for path, other in lists.items():
        if other != classes:
            raise DataError(
                f"{first} and {path} list different classes, so equal labels mean different ones; read the folders "
                "apart, or make the shards together"
            )
    return classes


def _read_ahead(paths: list[Path], rows: dict[Path, ShardRow], hashed: HashedShards | None) -> None:
    """Starts the reading of shards into the page cache, and compares those with rows with their manifest.

    A later read of a shard reports errors.
    """
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    begin = threading.get_native_id() % max(1, len(rows))  # workers start with different shards
    if hashed is None:
        return
    for path in [*rows][begin:] + [*rows][:begin]:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size == rows[path].bytes:
                hashed.hash_ahead(path, file.fileno(), identity_of(status), rows[path].sha256)


def _shard_fingerprint(shards: list[ShardIndex], names: list[str]) -> str:
    """Returns a hash of the samples and their offsets in the shards; the shards' folder doesn't matter."""
    digest = hashlib.sha256()
    for name, shard in zip(names, shards, strict=True):
        digest.update(f"{name}|{shard.tar_bytes}|{len(shard)}|".encode("utf-8", "surrogateescape"))
        for array in (shard.offsets, shard.sizes, shard.labels, shard.keys.ends, shard.keys.blob):
            digest.update(array.tobytes())
        if shard.texts:
            digest.update("\0".join(shard.texts).encode())
    return digest.hexdigest()

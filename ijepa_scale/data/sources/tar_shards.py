"""Reads samples from tar shards in local files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.sources.cache import Handle
from ijepa_scale.data.sources.class_list import CLASSES, number_labels, read_classes
from ijepa_scale.data.sources.scan import Members, Problems
from ijepa_scale.data.sources.tar_index import ShardIndex, index_tar
from ijepa_scale.errors import DataError
from ijepa_scale.regular_file import read_regular

MANIFEST = "manifest.json"
_OPEN_FILES = 64


class ShardSource:
    """The samples of indexed tar shards in local files."""

    def __init__(self, paths: list[Path], members: Members | None = None) -> None:
        if not paths:
            raise DataError("the list of shards is empty; name a folder of shards, a glob or a brace pattern")
        self._take([index_tar(path, members) for path in paths], [path.name for path in paths])
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
            DataError: the tar can't be read or has changed since it was indexed.
        """
        shard, row = self._locate(sample_id)
        index = self._shards[shard]
        size = int(index.sizes[row])
        try:
            data = os.pread(self._file(shard), size, int(index.offsets[row]))
        except OSError as error:
            raise DataError(f"shard {index.path} can't be read ({error.strerror}); check the disk") from None
        if len(data) != size:
            raise DataError(f"shard {index.path} is shorter than its index says; start again with the whole file")
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
        threading.Thread(target=_read_ahead, args=(paths,), daemon=True).start()

    def summary(self) -> str:
        """Returns the number of images and shards, for the log."""
        return f"{self.num_samples} images in {len(self.shard_sizes)} shards"

    def problems(self) -> Problems:
        """Returns what can't be used, including the samples that a cut-off shard lacks according to its manifest."""
        found = Problems()
        for shard in self._shards:
            found.extend(shard.problems)
            if "cut short" in shard.problems.counts:
                lost = manifest_samples(shard.path) - len(shard) - shard.problems.counts.total()
                for _ in range(max(0, lost)):
                    found.add("lost with the end of a shard", str(shard.path), "the manifest counts more samples")
        return found

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """Returns the shard of a sample and its row in the shard's index."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is not among {self.num_samples}; give 0 to {self.num_samples - 1}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, int(sample_id - (self._ends[shard] - self.shard_sizes[shard]))

    def _file(self, shard: int) -> int:
        """Returns an open file descriptor of a shard; closes the least recently used one if too many are open."""
        if shard not in self._files:
            self._files[shard] = self._open(self._shards[shard])
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard].descriptor

    def _open(self, index: ShardIndex) -> Handle:
        """Returns the open shard."""
        try:
            handle = Handle(os.open(index.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise DataError(f"shard {index.path} can't be read ({error.strerror}); check the disk") from None
        status = os.fstat(handle.descriptor)
        if (status.st_size, status.st_mtime_ns) != (index.tar_bytes, index.tar_mtime_ns):
            handle.close()
            raise DataError(f"shard {index.path} has changed since it was indexed; start again")
        return handle


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


@dataclass(frozen=True)
class ShardRow:
    """A shard's row in the manifest."""

    name: str
    bytes: int
    samples: int
    sha256: str


def parse_manifest(content: bytes, *, counted: bool = True) -> list[ShardRow]:
    """Returns the rows of a manifest; those that needn't be `counted` may lack "samples", which is then 0.

    Raises:
        ValueError: it is no manifest, or a value is of another kind, such as a number in quotes.
    """
    manifest = parse_json(content)
    rows = manifest.get("shards") if isinstance(manifest, dict) else None
    if not isinstance(rows, list):
        raise ValueError('it has no list "shards"')
    found = []
    for number, row in enumerate(rows):
        values: dict[str, Any] = {}
        for field in dataclasses.fields(ShardRow):
            value = row.get(field.name) if isinstance(row, dict) else None
            if value is None and field.name == "samples" and not counted:
                value = 0
            if type(value).__name__ != field.type or (isinstance(value, int) and value < 0):
                wanted = "a text" if field.type == "str" else "a whole number from 0"
                raise ValueError(f'"{field.name}" of shard {number} is {value!r}, not {wanted}')
            values[field.name] = value
        found.append(ShardRow(**values))
    return found


def manifest_samples(shard: Path) -> int:
    """Returns the number of samples that a shard has according to the manifest next to it; 0 if that can't be read."""
    try:
        rows = parse_manifest(read_regular(shard.parent / MANIFEST))
    except (OSError, ValueError):
        return 0
    return sum(row.samples for row in rows if row.name == shard.name)


def _read_ahead(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # reading the shard will report the error
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


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

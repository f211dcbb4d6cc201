"""Writes tar shards; equal samples always make equal bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import webdataset

from ijepa_scale.data.array_decode import NPY_MAGIC
from ijepa_scale.data.dicom_decode import is_dicom
from ijepa_scale.data.sources.class_list import CLASSES
from ijepa_scale.data.sources.shard_manifest import MANIFEST, ShardRow
from ijepa_scale.data.sources.tar_index import index_tar, is_tar
from ijepa_scale.data.tiff_decode import TIFF_MAGIC
from ijepa_scale.errors import DataError
from ijepa_scale.new_file import flush
from ijepa_scale.plurals import counted

PART = ".part"  # suffix of a file that isn't complete yet
_MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One image to write."""

    key: str  # unique, without dots
    image: bytes  # JPEG, PNG, WebP, TIFF, NPY or DICOM
    label: int | None = None


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    shard_bytes: int = 256 << 20,
    prefix: str = "shard",
    classes: list[str] | None = None,
) -> list[Path]:
    """Writes tar shards with their indices, `manifest.json` and `classes.json` into `folder`; returns the tars.

    A shard is closed before the sample that would take its images over `shard_bytes`. It gets its name only when it
    is complete, and records no time or user, so equal samples make equal bytes.

    Raises:
        DataError: the folder already holds shards, or a sample can't be part of one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_empty(folder)
    rows = []
    for row, _ in write_parts(samples, folder, shard_bytes=shard_bytes, prefix=prefix):
        publish(folder, row)
        rows.append(row)
    write_manifest(folder, rows, classes=classes)
    return [folder / row.name for row in rows]


def check_empty(folder: Path) -> None:
    """Checks that writing shards into a folder wouldn't overwrite or mix up other shards.

    Raises:
        DataError: it holds shards, a manifest or class names.
    """
    found = sorted(
        entry.name
        for entry in folder.iterdir()
        if is_tar(entry.name.removesuffix(PART)) or entry.name in (MANIFEST, CLASSES)
    )
    if found:
        raise DataError(f"folder {folder} already holds shards ({found[0]}); name an empty one")


def write_parts(
    samples: Iterable[Sample], folder: Path, *, shard_bytes: int, prefix: str, first: int = 0
) -> Iterator[tuple[ShardRow, str]]:
    """Writes shards under their names with the suffix `PART`; yields each complete one and its last sample's key.

    A yielded shard is synced to disk; `publish` then gives it its name. `first` is the number of the first shard.

    Raises:
        DataError: a sample that can't be part of a shard.
    """
    part: _Part | None = None
    try:
        for sample in samples:
            if part is not None and part.image_bytes + len(sample.image) > shard_bytes:
                row, last = part.close(), part.last_key
                part, first = None, first + 1
                yield row, last
            if part is None:
                part = _Part(folder / f"{prefix}-{first:06d}.tar")
            part.add(sample)
    except BaseException:
        if part is not None:
            part.abandon()
        raise
    if part is not None:
        yield part.close(), part.last_key


def publish(folder: Path, row: ShardRow) -> None:
    """Gives a complete shard its final name, and writes its index.

    Raises:
        DataError: another file has the name.
    """
    path = folder / row.name
    if path.exists():
        raise DataError(f"{path} has appeared while it was being written; remove it, or write into another folder")
    os.replace(f"{path}{PART}", path)
    flush(folder)
    index_tar(path)


def write_manifest(
    folder: Path, rows: list[ShardRow], *, classes: list[str] | None, left_out: Mapping[str, int] | None = None
) -> None:
    """Writes `classes.json` and then `manifest.json`, which marks the set as complete.

    `left_out` counts the images that are in no shard, by kind.

    Raises:
        DataError: there is no shard, or one doesn't read back as it was written.
    """
    if not rows:
        raise DataError(f"there are no samples to write into {folder}; check their source")
    for row in rows:
        index = index_tar(folder / row.name)
        if len(index) != row.samples or index.problems.counts:
            raise DataError(
                f"{folder / row.name} reads as {counted(len(index), 'sample')}, but {row.samples} were written "
                f"({index.problems.summary() or 'no problems'}); check the disk and write into an empty folder"
            )
    if classes is not None:
        write_classes(folder, classes)
    manifest = {
        "version": _MANIFEST_VERSION,
        "samples": sum(row.samples for row in rows),
        "bytes": sum(row.bytes for row in rows),
        "left_out": dict(sorted((left_out or {}).items())),
        "shards": [asdict(row) for row in rows],
    }
    _write_json(folder / MANIFEST, manifest)


def write_classes(folder: Path, classes: list[str]) -> Path:
    """Writes the class list of the shards in a folder atomically, and returns its path."""
    _write_json(folder / CLASSES, classes)
    return folder / CLASSES


class _Part:
    """A shard that is being written; hashes the bytes as they are written."""

    def __init__(self, path: Path) -> None:
        self._name, self._part = path.name, path.with_name(path.name + PART)
        self._file = self._part.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = self._samples = 0
        self._tar = webdataset.TarWriter(self, user="", group="", encoder=False, mtime=0, format="GNU_FORMAT")
        self.image_bytes = 0
        self.last_key = ""

    def write(self, data: bytes) -> int:
        """Writes and hashes bytes for the tar writer; returns their number."""
        if self._file.closed:  # abandoned: drop what the writer still had buffered
            return len(data)
        self._digest.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def add(self, sample: Sample) -> None:
        """Appends one sample."""
        if not sample.key or "." in sample.key.rpartition("/")[2]:
            raise DataError(f"key {sample.key!r} is empty or has a dot; tar shards split names at dots")
        content = {"__key__": sample.key, _suffix(sample): sample.image}
        if sample.label is not None:
            content["cls"] = str(sample.label).encode()
        self._tar.write(content)
        self._samples += 1
        self.image_bytes += len(sample.image)
        self.last_key = sample.key

    def close(self) -> ShardRow:
        """Finishes the shard, syncs it to disk, and returns its row in the manifest."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        flush(self._part.parent)
        return ShardRow(self._name, self._bytes, self._samples, self._digest.hexdigest())

    def abandon(self) -> None:
        """Removes the unfinished shard."""
        with contextlib.suppress(OSError):  # from a full disk; the caller raises the original error
            self._file.close()
        self._part.unlink(missing_ok=True)


def image_suffix(image: bytes) -> str | None:
    """Returns the file suffix for an image, by its first bytes; None for a format that shards can't hold."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    if image[:4] in TIFF_MAGIC:
        return "tif"
    if image.startswith(NPY_MAGIC):
        return "npy"
    return "dcm" if is_dicom(image) else None


def _suffix(sample: Sample) -> str:
    suffix = image_suffix(sample.image)
    if suffix is None:
        raise DataError(
            f"image {sample.key!r} begins with {sample.image[:12]!r}; give JPEG, PNG, WebP, TIFF, NPY or DICOM"
        )
    return suffix


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + PART)
    with temporary.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


__all__ = [
    "CLASSES", "MANIFEST", "PART", "Sample", "ShardRow", "check_empty", "image_suffix", "publish",
    "write_classes", "write_manifest", "write_parts", "write_shards",
]  # fmt: skip

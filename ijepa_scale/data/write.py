"""Writing tar shards, the same bytes from the same samples every time. Floor 2: files only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import webdataset

from ijepa_scale import rng
from ijepa_scale.data.index import index_tar
from ijepa_scale.data.source import SampleSource
from ijepa_scale.errors import DataError

MANIFEST = "manifest.json"
CLASSES = "classes.json"
_MANIFEST_VERSION = 1
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One image to be written."""

    key: str  # unique, without dots
    image: bytes  # JPEG, PNG or WebP
    label: int | None = None


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    shard_bytes: int = 256 << 20,
    prefix: str = "shard",
    classes: list[str] | None = None,
) -> list[Path]:
    """Returns the tar shards written into `folder`, with their indices, `manifest.json` and `classes.json` beside.

    A shard is closed before the sample that would take its images over `shard_bytes`, appears under its name when
    it is whole, and carries no time or user: equal samples make equal bytes.

    Raises:
        DataError: the folder already holds shards, or a sample can't be part of one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")) or (folder / MANIFEST).exists():
        raise DataError(f"folder {folder} already holds shards; name an empty one")
    shards: list[Path] = []
    for group in _groups(samples, shard_bytes):
        path = folder / f"{prefix}-{len(shards):06d}.tar"
        _write_tar(group, path)
        shards.append(path)
    if not shards:
        raise DataError(f"there are no samples to write into {folder}; check what they come from")
    if classes is not None:
        _write_json(folder / CLASSES, classes)
    rows = [
        {"name": path.name, "bytes": path.stat().st_size, "samples": len(index_tar(path)), "sha256": _sha256(path)}
        for path in shards
    ]
    total = sum(int(str(row["samples"])) for row in rows)
    _write_json(folder / MANIFEST, {"version": _MANIFEST_VERSION, "samples": total, "shards": rows})
    return shards


def source_samples(source: SampleSource, *, seed: int = 0) -> Iterator[Sample]:
    """Yields all samples of a source in a shuffled order, so that every shard holds every class."""
    digits = max(6, len(str(source.num_samples - 1)))
    for place, sample in enumerate(rng.permutation(source.num_samples, seed, "write")):
        data, label = source.read(int(sample)), source.label(int(sample))
        if not isinstance(data, bytes):
            raise DataError(f"sample {source.name(int(sample))} is pixels; only encoded images can be written")
        yield Sample(f"{place:0{digits}d}", data, label if label >= 0 else None)


def _groups(samples: Iterable[Sample], shard_bytes: int) -> Iterator[list[Sample]]:
    """Yields the samples of one shard after another."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        if group and size + len(sample.image) > shard_bytes:
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample.image)
    if group:
        yield group


def _write_tar(group: list[Sample], path: Path) -> None:
    """Writes one tar under a temporary name and renames it."""
    temporary = path.with_suffix(".tar.part")
    with temporary.open("wb") as file:
        with webdataset.TarWriter(file, user="", group="", encoder=False, mtime=0, format="GNU_FORMAT") as tar:
            for sample in group:
                if not sample.key or "." in sample.key.rpartition("/")[2]:
                    raise DataError(f"key {sample.key!r} is empty or has a dot; tar shards split names at dots")
                content = {"__key__": sample.key, _suffix(sample): sample.image}
                if sample.label is not None:
                    content["cls"] = str(sample.label).encode()
                tar.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _suffix(sample: Sample) -> str:
    """Returns the file suffix that the image's first bytes call for."""
    head = sample.image[:12]
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return "webp"
    raise DataError(f"image {sample.key!r} begins with {head!r}; give JPEG, PNG or WebP")


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

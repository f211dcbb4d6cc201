"""Checks that shards match their manifest and that each image decodes. Knows nothing of terminals or training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.deep_decode import decode_as
from ijepa_scale.data.shards.journal import JOURNAL
from ijepa_scale.data.shards.write import ShardRow
from ijepa_scale.data.sources.class_list import read_classes
from ijepa_scale.data.sources.fetch import file_sha256
from ijepa_scale.data.sources.scan import Members
from ijepa_scale.data.sources.shard_manifest import MANIFEST, read_manifest
from ijepa_scale.data.sources.tar_index import ShardIndex, index_path, load_index, scan_index
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError, SampleError
from ijepa_scale.plurals import counted

_PREFETCH = 2


@dataclass(frozen=True)
class Verdict:
    """The faults of one shard or folder, and the number of images that were checked."""

    faults: tuple[str, ...]  # one message each
    num_samples: int = 0
    hashed: bool = True  # false if no manifest says what the hash should be


def verify_shards(
    paths: list[Path], *, workers: int = 0, members: Members | None = None, pixels: PixelFormat = RGB8
) -> Iterator[Verdict]:
    """Yields a verdict on the manifest and class names of each folder, then one on each shard, in order.

    Hashes each shard and compares it with the manifest, lists its members again and compares them with its index,
    and decodes each image fully. A JPEG with a flipped byte often still decodes, but the hash reveals it.
    """
    rows: dict[Path, dict[str, ShardRow] | None] = {}
    listed: dict[Path, list[str] | None] = {}
    for folder in sorted({path.parent for path in paths}):
        faults = []
        rows[folder] = listed[folder] = None
        try:
            rows[folder] = read_manifest(folder)
            listed[folder] = read_classes(folder)
        except DataError as error:
            faults.append(str(error))
        names = rows[folder] or {}
        faults += [
            f"{folder / name}: missing, though {MANIFEST} lists it"
            for name in names
            if not os.path.exists(folder / name)
        ]
        if (folder / JOURNAL).exists():
            faults.append(f"{folder}: unfinished ({JOURNAL} exists); run make again with the same arguments")
        yield Verdict(tuple(faults))
    items = [(path, rows[path.parent], listed[path.parent]) for path in paths]
    yield from ordered_loader(_Shards(members, pixels), items, workers=workers, prefetch=_PREFETCH)


class _Shards(Dataset):
    """Maps (path, manifest rows, class names) to the verdict on that shard."""

    def __init__(self, members: Members | None, pixels: PixelFormat) -> None:
        self._members, self._pixels = members, pixels

    def __getitem__(self, item: tuple[Path, dict[str, ShardRow] | None, list[str] | None]) -> Verdict:
        path, rows, classes = item
        try:
            index = scan_index(path, path.stat(), self._members)
            faults = [] if rows is None else _against_manifest(path, rows.get(path.name), num_samples=len(index))
        except DataError as error:
            return Verdict((str(error),), hashed=rows is not None)
        except OSError as error:
            return Verdict((f"{path} can't be read ({error.strerror}); check the disk",), hashed=rows is not None)
        faults += _index_faults(index, self._members)
        faults += [f"{path}: {problem.name}: {problem.reason}" for problem in index.problems.named]
        unnamed = index.problems.counts.total() - len(index.problems.named)
        if unnamed:
            faults.append(f"{path}: {unnamed} more problems of these kinds")
        faults += _sample_faults(index, classes, self._pixels)
        return Verdict(tuple(faults), len(index), hashed=rows is not None)


def _against_manifest(path: Path, row: ShardRow | None, *, num_samples: int) -> list[str]:
    """Returns how a shard differs from its row in the manifest."""
    if row is None:
        return [f"{path}: not in {MANIFEST}; move it away, or make the set again"]
    found = path.stat().st_size
    if found != row.bytes:
        return [f"{path}: {found} bytes instead of {row.bytes}; copy or make it again"]
    digest = file_sha256(path)
    if digest != row.sha256:
        return [f"{path}: SHA-256 {digest[:12]}... instead of {row.sha256[:12]}...; copy or make it again"]
    if num_samples != row.samples:
        return [f"{path}: {counted(num_samples, 'sample')}, {MANIFEST} says {row.samples}; make the set again"]
    return []


def _index_faults(index: ShardIndex, members: Members | None) -> list[str]:
    """Returns a fault if the stored index of a shard doesn't match the shard."""
    stored = index_path(index.path, members)
    kept = load_index(stored, index.path, index.tar_bytes, index.tar_mtime_ns)
    if kept is None or all(
        np.array_equal(getattr(kept, name), getattr(index, name)) for name in ("offsets", "sizes", "labels", "texts")
    ):
        return []
    return [f"{stored}: doesn't match the samples in the shard; remove it"]


def _sample_faults(index: ShardIndex, classes: list[str] | None, pixels: PixelFormat) -> list[str]:
    """Returns the faults of single samples."""
    faults, known = [], frozenset(classes or ())
    with index.path.open("rb") as file:
        for row, (offset, size, label) in enumerate(zip(index.offsets, index.sizes, index.labels, strict=True)):
            name = f"{index.path}:{index.keys[row]}"
            try:
                decode_as(pixels, os.pread(file.fileno(), int(size), int(offset)))
            except SampleError as error:
                faults.append(f"{name}: {error}")
            text = index.label_text(row)
            if classes is not None and label >= len(classes):
                faults.append(f"{name}: label {label}, but there are {len(classes)} class names")
            elif classes is not None and text is not None and text not in known:
                faults.append(f"{name}: label {text!r} is not among the {len(classes)} class names")
    return faults


__all__ = ["Verdict", "verify_shards"]

"""Where a sample's bytes and label come from: tar shards, class folders, or nothing at all. Floor 2.

Samples are numbered 0 .. num_samples - 1 through the shards in their sorted order. Files are opened at the first
read in each process and read with `os.pread`, so a source may be forked or pickled at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ijepa_scale import rng
from ijepa_scale.data.cache import Handle
from ijepa_scale.data.index import NO_LABEL, Names, ShardIndex, index_tar
from ijepa_scale.data.scan import Problems
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
MANIFEST = "manifest.json"
CLASSES = "classes.json"
_OPEN_FILES = 64
SPLITS = {"train", "val", "valid", "validation", "test"}


class SampleSource(Protocol):
    """A set of images that can be read in any order."""

    num_samples: int
    shard_sizes: np.ndarray  # (S,) int64, sum = num_samples: samples that lie close together
    fingerprint: str  # changes when the list of samples does, and not when the files move
    classes: list[str] | None  # names by label, where the set has them

    def read(self, sample_id: int) -> bytes | np.ndarray:
        """Returns the encoded image, or its pixels (H, W, 3) uint8 where there is nothing to decode."""

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 where there is none."""

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 where there is none."""

    def name(self, sample_id: int) -> str:
        """Returns what a person calls the sample, for messages."""

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Says which shards are read from now on and which ones after them; returns at once."""

    def problems(self) -> Problems:
        """Returns what the listing of the samples had to leave out."""

    def summary(self) -> str:
        """Returns what there is, for the log."""


class ShardSource:
    """Samples of indexed tar shards in local files."""

    def __init__(self, paths: list[Path]) -> None:
        if not paths:
            raise DataError("the list of shards is empty; name a folder of shards, a glob or a brace pattern")
        self._take([index_tar(path) for path in paths], [path.name for path in paths])
        beside = paths[0].parent / CLASSES
        self.classes: list[str] | None = parse_classes(beside.read_bytes(), str(beside)) if beside.is_file() else None

    def _take(self, shards: list[ShardIndex], names: list[str]) -> None:
        """Numbers the samples of these shards, whose names are the same wherever they lie."""
        self._shards = shards
        if not any(len(shard) for shard in shards):
            raise DataError(f"no shard holds a sample that can be read: {self.problems().summary()}")
        self.shard_sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.fingerprint = _shard_fingerprint(shards, names)
        self._ends = np.cumsum(self.shard_sizes)
        self._files: OrderedDict[int, Handle] = OrderedDict()  # shard -> open file of this process

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
            raise DataError(f"shard {index.path} has become shorter than its index; start again with the whole file")
        return data

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 where there is none."""
        shard, row = self._locate(sample_id)
        return int(self._shards[shard].labels[row])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 where there is none."""
        return np.concatenate([shard.labels for shard in self._shards]).astype(np.int64)

    def name(self, sample_id: int) -> str:
        """Returns tar and key."""
        shard, row = self._locate(sample_id)
        return f"{self._shards[shard].path}:{self._shards[shard].keys[row]}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Has the system read the shards into its cache, in the background."""
        paths = [self._shards[int(shard)].path for shard in [*now, *soon]]
        threading.Thread(target=_read_ahead, args=(paths,), daemon=True).start()

    def summary(self) -> str:
        """Returns what there is, for the log."""
        return f"{self.num_samples} images in {len(self.shard_sizes)} shards"

    def problems(self) -> Problems:
        """Returns what of the shards can't be used, with what their manifest says is missing."""
        found = Problems()
        for shard in self._shards:
            found.extend(shard.problems)
            if "cut short" in shard.problems.counts:
                lost = manifest_samples(shard.path) - len(shard) - shard.problems.counts.total()
                for _ in range(max(0, lost)):
                    found.add("lost with the end of a shard", str(shard.path), "the manifest counts more samples")
        return found

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """Returns (shard, row in it) of a sample."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is not among {self.num_samples}; give 0 to {self.num_samples - 1}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, int(sample_id - (self._ends[shard] - self.shard_sizes[shard]))

    def _file(self, shard: int) -> int:
        """Returns an open file descriptor of a shard, closing the one used longest ago where there are many."""
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


class ImageFolderSource:
    """Images in class folders, numbered class by class: labels as torchvision's ImageFolder gives them.

    ROOT/train is taken where ROOT holds splits (train, val, test) only. All of it is one shard: files are
    read in any order at the same cost, so the whole set is shuffled together.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = _class_root(Path(root))
        classes = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
        self.classes: list[str] | None = classes
        names: list[str] = []
        counts: list[int] = []
        for name in classes:
            found = _images(self.root, name)
            if not found:
                raise DataError(
                    f"class folder {self.root / name} holds no image ({', '.join(FOLDER_SUFFIXES)}); drop it"
                )
            names += found
            counts.append(len(found))
        if not names:
            raise DataError(
                f"folder {self.root} holds no class folders; give the folder with CLASS/*.jpg in it, or its parent"
            )
        self._names = Names.of(names)
        self._class_ends = np.cumsum(counts)
        self.num_samples = len(names)
        self.shard_sizes = np.array([len(names)], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.tobytes())
        digest.update(self._names.ends.tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            DataError: the file can't be read.
        """
        path = self.root / self._names[sample_id]
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} can't be read ({error.strerror}); check the path and the disk") from None

    def label(self, sample_id: int) -> int:
        """Returns the number of the class folder."""
        return int(np.searchsorted(self._class_ends, sample_id, side="right"))

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 where there is none."""
        return np.searchsorted(self._class_ends, np.arange(self.num_samples), side="right").astype(np.int64)

    def name(self, sample_id: int) -> str:
        """Returns the path."""
        return str(self.root / self._names[sample_id])

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: files in a folder have no common place."""

    def summary(self) -> str:
        """Returns what there is, for the log."""
        return f"{self.num_samples} images in {len(self.classes or ())} class folders"

    def problems(self) -> Problems:
        """Returns none: only images are listed."""
        return Problems()


class SyntheticSource:
    """Noise images that cost next to nothing: windows of one fixed texture. For benchmarks and tests."""

    _SHARD = 1024
    _CLASSES = 1000

    def __init__(self, num_samples: int, image_size: tuple[int, int] = (256, 256), seed: int = 0) -> None:
        self.num_samples = num_samples
        full, rest = divmod(num_samples, self._SHARD)
        self.shard_sizes = np.array([self._SHARD] * full + [rest] * bool(rest), dtype=np.int64)
        self.classes: list[str] | None = None
        self.fingerprint = f"synthetic-{num_samples}-{image_size[0]}x{image_size[1]}-{seed}"
        self._shape = (*image_size, 3)
        self._bytes = image_size[0] * image_size[1] * 3
        texture = np.random.Generator(np.random.Philox(key=rng.key(seed, "synthetic")))
        self._texture = texture.integers(0, 256, 2 * self._bytes + 1, dtype=np.uint8)

    def read(self, sample_id: int) -> np.ndarray:
        """Returns pixels (H, W, 3) uint8, a view: not to be written to."""
        begin = sample_id * 7919 % (self._bytes + 1)  # a prime stride spreads neighbours over the texture
        return self._texture[begin : begin + self._bytes].reshape(self._shape)

    def label(self, sample_id: int) -> int:
        """Returns one of 1000 labels."""
        return sample_id % self._CLASSES

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 where there is none."""
        return np.arange(self.num_samples, dtype=np.int64) % self._CLASSES

    def name(self, sample_id: int) -> str:
        """Returns the number."""
        return f"synthetic:{sample_id}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing."""

    def summary(self) -> str:
        """Returns what there is, for the log."""
        return f"{self.num_samples} synthetic images"

    def problems(self) -> Problems:
        """Returns none."""
        return Problems()


def check_problems(problems: Problems, num_samples: int, max_bad_fraction: float, *, log: bool = True) -> None:
    """Logs what the listing of a set left out; with `log` false it only checks.

    Raises:
        DataError: it is more than `max_bad_fraction` of the set.
    """
    bad = problems.counts.total()
    if not bad:
        return
    text = f"{bad} of {bad + num_samples} samples can't be used: {problems.summary()}"
    if bad > max_bad_fraction * (bad + num_samples):
        raise DataError(f"{text}; over data.max_bad_fraction {max_bad_fraction:g}: mend the data or raise the limit")
    if log:
        logger.warning("%s", text)
    for problem in problems.named[1:] if log else ():
        logger.warning("left out: %s: %s", problem.name, problem.reason)


def parse_classes(content: bytes, origin: str) -> list[str]:
    """Returns the class names in the content of a classes.json.

    Raises:
        DataError: it is no list of names.
    """
    try:
        names = json.loads(content)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
    except ValueError as error:
        raise DataError(f"{origin} is no list of class names ({error}); write it again, or remove it") from None
    return names


def manifest_samples(shard: Path) -> int:
    """Returns the samples that the manifest beside a shard says it has; 0 where that can't be read."""
    try:
        rows = json.loads((shard.parent / MANIFEST).read_text())["shards"]
        return sum(int(row["samples"]) for row in rows if row["name"] == shard.name)
    except (OSError, ValueError, TypeError, LookupError):
        return 0


def _read_ahead(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # who reads the shard will say what is wrong with it
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _shard_fingerprint(shards: list[ShardIndex], names: list[str]) -> str:
    """Returns a hash of what the samples are and where they lie, whatever folder the shards are in."""
    digest = hashlib.sha256()
    for name, shard in zip(names, shards, strict=True):
        digest.update(f"{name}|{shard.tar_bytes}|{len(shard)}|".encode("utf-8", "surrogateescape"))
        for array in (shard.offsets, shard.sizes, shard.labels, shard.keys.ends, shard.keys.blob):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _class_root(root: Path) -> Path:
    """Returns the folder whose sub-folders are the classes."""
    if not root.is_dir():
        raise DataError(f"folder {root} doesn't exist; give the folder with CLASS/*.jpg in it, or its parent")
    folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
    return root / "train" if "train" in folders and folders <= SPLITS else root


def _images(root: Path, folder: str) -> list[str]:
    """Returns the images below a class folder relative to `root`, in torchvision's order."""
    found = []
    for parent, _, files in sorted(os.walk(root / folder, followlinks=True)):
        relative = os.path.relpath(parent, root)
        found += [os.path.join(relative, file) for file in sorted(files) if file.lower().endswith(FOLDER_SUFFIXES)]
    return found


__all__ = [
    "NO_LABEL",
    "ImageFolderSource",
    "SampleSource",
    "ShardSource",
    "SyntheticSource",
    "check_problems",
]

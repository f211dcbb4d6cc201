"""A part of a set of images, named in a text file with one name per line, and the writing of such files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted
from ijepa_scale.regular_file import read_regular

_IN_TAR = re.compile(r"\.tar:")  # a sample's name is its tar's path, a colon and its key


class SubsetSource:
    """The samples of `whole` whose names are in a file, in the order of `whole`.

    A line is the end of one sample's path: its file's name, or also folders before it. A suffix may be missing on
    either side. So the published lists of 1% and 10% of ImageNet fit class folders, and shards that keep the names.
    Empty lines and those that begin with `#` don't count.

    Raises:
        DataError: the file can't be read, or a line names no sample or several.
    """

    def __init__(self, whole: SampleSource, path: str | Path) -> None:
        self._whole, self._path = whole, Path(path)
        self._ids = _ids_of(whole, self._path)
        self.num_samples = len(self._ids)
        self.shard_sizes = np.array([self.num_samples], dtype=np.int64)
        self.classes = whole.classes
        digest = hashlib.sha256(whole.fingerprint.encode())
        digest.update(self._ids.tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, sample_id: int) -> bytes | np.ndarray:
        """Returns the encoded image, or its pixels."""
        return self._whole.read(int(self._ids[sample_id]))

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 if there is none."""
        return self._whole.label(int(self._ids[sample_id]))

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there is none."""
        return self._whole.labels()[self._ids]

    def name(self, sample_id: int) -> str:
        """Returns a readable name of the sample."""
        return self._whole.name(int(self._ids[sample_id]))

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single samples are not prefetched."""

    def problems(self) -> Problems:
        """Returns the problems of the whole set."""
        return self._whole.problems()

    def summary(self) -> str:
        """Returns the number of images and what they are from, for the log."""
        return f"{counted(self.num_samples, 'image')} that {self._path} names of {self._whole.summary()}"


def write_subset(whole: SampleSource, ids: np.ndarray, path: Path) -> None:
    """Writes the names of samples, as `SubsetSource` reads them: with as few folders as tell all samples apart.

    Raises:
        DataError: two samples have one name, or one that isn't a line of its own.
    """
    parts = [_parts(whole.name(number)) for number in range(whole.num_samples)]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(each[-depth:]) for each in parts]
        if len(set(ends)) == len(ends) and all(_is_line(ends[number]) for number in ids.tolist()):
            break
    else:
        raise DataError(
            f"{whole.summary()}: two samples have one name, or one that isn't a line of its own, such as with a line "
            "break; give each another name, and write the subset again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{ends[number]}\n" for number in ids.tolist()), encoding="utf-8", errors="surrogateescape")


def _is_line(name: str) -> bool:
    """Returns whether a line of a subset's file that holds a name is read as that name."""
    return name.splitlines() == [name.strip()] and not name.startswith("#")


def _ids_of(whole: SampleSource, path: Path) -> np.ndarray:
    try:
        lines = os.fsdecode(read_regular(path)).splitlines()
    except OSError as error:
        raise DataError(
            f"subset {path} can't be read ({error.strerror}); give a text file with a name per line"
        ) from None
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    names = [_parts(whole.name(number)) for number in range(whole.num_samples)]
    tables: dict[tuple[int, bool], dict[str, int]] = {}  # (parts, with suffix) -> the sample of each end; -1: several
    found: set[int] = set()
    for line in wanted:
        parts = _parts(line)
        number = None
        for key in ((len(parts), True), (len(parts), False)):
            if key not in tables:
                tables[key] = _table(names, *key)
            number = tables[key].get("/".join(_end(parts, *key)))
            if number is not None:
                break
        if number is None or number < 0:
            what = "names no image" if number is None else "names several images"
            raise DataError(
                f"subset {path}: {line!r} {what} of {whole.summary()} (the first is {whole.name(0)}); give the end of "
                "one image's path in each line"
            )
        found.add(number)
    if not found:
        raise DataError(f"subset {path} names no image; give a text file with a name per line")
    return np.array(sorted(found), dtype=np.int64)


def _table(names: list[list[str]], depth: int, suffix: bool) -> dict[str, int]:
    table: dict[str, int] = {}
    for number, parts in enumerate(names):
        end = "/".join(_end(parts, depth, suffix))
        table[end] = -1 if end in table else number
    return table


def _end(parts: list[str], depth: int, suffix: bool) -> Iterator[str]:
    *folders, name = parts[-depth:]
    yield from folders
    yield name if suffix else os.path.splitext(name)[0]


def _parts(name: str) -> list[str]:
    return [part for part in _IN_TAR.sub(".tar/", name).split("/") if part not in ("", ".")]

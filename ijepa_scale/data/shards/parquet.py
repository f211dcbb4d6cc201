"""Reads images from a column of Parquet files, to be made into shards: Hugging Face's layout, or plain bytes.

A row group is read as a whole, so images are best read window by window; see `window_shards`. Doesn't decode images.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.sources.file_list import numbered
from ijepa_scale.data.sources.labels import NO_LABEL
from ijepa_scale.data.sources.read_file import check_size
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.errors import DataError, SampleError
from ijepa_scale.plurals import counted

MAX_GROUP_BYTES = 2 << 30  # of the images of a row group, uncompressed
_WINDOW_BYTES = 128 << 20  # of the row groups that each reading process keeps
_MOST_GROUPS = 64  # in a window
_PART = re.compile(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?\.parquet")  # how Hugging Face names the files of a split
_DAMAGED = "damaged row group"


@dataclass(frozen=True)
class Columns:
    """The columns to read of files in which several may hold images or labels."""

    image: str | None = None  # None: the only one with bytes
    label: str | None = None  # None: the one called label, else the only one of Hugging Face's type ClassLabel


@dataclass(frozen=True)
class _File:
    """A Parquet file and what the listing has found in it."""

    path: Path
    stamp: tuple[int, int]  # bytes and mtime
    image: str  # the path of the column of bytes, like image.bytes
    groups: list[tuple[int, int]]  # rows and bytes of each row group
    label: str | None
    names: list[str] | None  # of classes
    columns: list[str]
    labels: list[Any]


class ParquetImages:
    """The images of Parquet files: a file, a folder of them, a glob or a brace pattern.

    The image column holds bytes, or structs whose field `bytes` does. The label column holds whole numbers, which are
    named if Hugging Face's metadata name them, or class names, which are numbered in sorted order; a missing or
    negative number is no label.

    Raises:
        DataError: pyarrow is missing, a file can't be read, or its columns of images or labels can't be told.
    """

    def __init__(self, pattern: str | Path, columns: Columns | None = None) -> None:
        paths = expand(pattern, ".parquet")
        _check_splits(paths)
        self._files = [_listed(path, columns or Columns()) for path in paths]
        first = self._files[0]
        for other in self._files[1:]:
            if (other.image, other.label, other.names) != (first.image, first.label, first.names):
                raise DataError(
                    f"{first.path} and {other.path} have different columns or class names; make a set of each"
                )
        self._groups = [(file, group) for file in self._files for group in range(len(file.groups))]
        self.shard_sizes = np.array([file.groups[group][0] for file, group in self._groups], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.num_samples = int(self.shard_sizes.sum())
        if not self.num_samples:
            raise DataError(f"{pattern} holds no rows; give Parquet files with images")
        largest = max(file.groups[group][1] for file, group in self._groups)
        self.window_shards = min(_MOST_GROUPS, max(1, _WINDOW_BYTES // max(1, largest)))
        self.classes, self._labels = _numbers(self._files)
        self.origin = f"Parquet files {os.path.abspath(pattern)}"
        digest = hashlib.sha256(self._labels.tobytes())
        for file in self._files:
            digest.update(
                f"{file.path.name}|{file.stamp[0]}|{file.image}|{file.groups}".encode("utf-8", "surrogateescape")
            )
        self.fingerprint = digest.hexdigest()
        self._kept: OrderedDict[int, Any] = OrderedDict()  # row groups by number, read by this process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            SampleError: it has no bytes, too many, or its row group is damaged.
            DataError: the file can't be read or has changed since it was listed.
        """
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        if number not in self._kept:
            self._kept[number] = self._read_group(number)
            if len(self._kept) > self.window_shards:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        group = self._kept[number]
        if group is None:
            raise SampleError("its row group can't be read; write the file again", _DAMAGED)
        data = group[sample_id - int(self._ends[number] - self.shard_sizes[number])].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise SampleError("no bytes, but at most a path; write the file with its images embedded", "no image")
        check_size(len(data))
        return data

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 if there is none."""
        return int(self._labels[sample_id])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there is none."""
        return self._labels

    def name(self, sample_id: int) -> str:
        """Returns the file and the row in it, from 0."""
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        file, group = self._groups[number]
        before = sum(rows for rows, _ in file.groups[:group])
        return f"{file.path}:{before + sample_id - int(self._ends[number] - self.shard_sizes[number])}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: a row group is read when its first image is."""

    def summary(self) -> str:
        """Returns the number of images, and where labels and images come from, for the log."""
        first = self._files[0]
        column = first.image.removesuffix(".bytes")
        labels = f"labels from {first.label}" if first.label else f"no labels (columns {', '.join(first.columns)})"
        return (
            f"{counted(self.num_samples, 'image')} in "
            f"{counted(len(self._files), 'Parquet file')}, images from {column}, {labels}"
        )

    def problems(self) -> Problems:
        """Returns no problems: a bad image is only found when it is read."""
        return Problems()

    def _read_group(self, number: int) -> Any:
        """Returns the images of a row group as an arrow column; None if it is damaged."""
        file, group = self._groups[number]
        arrow, parquet = _pyarrow()
        try:
            if _stamp(file.path) != file.stamp:
                raise DataError(f"{file.path} has changed since it was listed; start again in an empty folder")
            # as a dictionary, repeated bytes take no memory of their own
            with parquet.ParquetFile(file.path, read_dictionary=[file.image]) as opened:
                column = opened.read_row_group(group, columns=[file.image], use_threads=False).column(0)
                column.validate(full=True)  # indices of a damaged file may point outside
                return column
        except arrow.ArrowException:
            return None
        except OSError as error:
            if error.errno is None:  # arrow's, for damaged pages
                return None
            raise DataError(f"{file.path} can't be read ({error.strerror}); check the disk") from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("--from parquet needs pyarrow; pip install 'ijepa_scale[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_splits(paths: list[Path]) -> None:
    """Refuses files that belong to several splits by their names, like train-00000-of-00002.parquet."""
    of_split = {match[1]: path for path in paths if (match := _PART.fullmatch(path.name))}
    if len(of_split) > 1:
        name = "train" if "train" in of_split else min(of_split)
        raise DataError(
            f"{of_split[name].parent} holds files of several splits ({', '.join(sorted(of_split))}); give those of "
            f"one, like {of_split[name].parent / name}-*.parquet"
        )


def _listed(path: Path, wanted: Columns) -> _File:
    """Returns what a file holds; reads its labels, but no images."""
    arrow, parquet = _pyarrow()
    try:
        stamp = _stamp(path)
        with parquet.ParquetFile(path) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            features = _features(schema.metadata or {})
            image = _image_column(arrow, schema, wanted.image, path)
            label = _label_column(schema.names, features, wanted.label, path)
            columns = (
                [metadata.row_group(0).column(n).path_in_schema for n in range(metadata.num_columns)]
                if (metadata.num_row_groups)
                else [image]
            )
            at = columns.index(image)
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            sizes = [(group.num_rows, group.column(at).total_uncompressed_size) for group in groups]
            labels = [] if label is None else opened.read([label], use_threads=False).column(0).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} isn't a readable Parquet file ({_line(error)}); copy or write it again") from None
    if max((size for _, size in sizes), default=0) > MAX_GROUP_BYTES:
        raise DataError(
            f"{path} has row groups of over {MAX_GROUP_BYTES} bytes of images, which are read whole; write it with "
            "smaller ones (row_group_size=100)"
        )
    names = features.get(label or "", {}).get("names")
    return _File(path, stamp, image, sizes, label, names, schema.names, labels)


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Returns the features in Hugging Face's metadata, by column; those of classes with the list `names`."""
    try:
        features = parse_json(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {
            name: feature
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel" and all(isinstance(one, str) for one in feature["names"])
        }
    except (ValueError, AttributeError, LookupError, TypeError):  # metadata of others
        return {}


def _image_column(arrow: Any, schema: Any, wanted: str | None, path: Path) -> str:
    """Returns the path in the file of the column of encoded images."""

    def holds_bytes(kind: Any) -> bool:
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        return kind in (arrow.binary(), arrow.large_binary())

    found = {}
    for field in schema:
        if holds_bytes(field.type):
            found[field.name] = field.name
        elif arrow.types.is_struct(field.type) and any(
            inner.name == "bytes" and holds_bytes(inner.type) for inner in field.type
        ):
            found[field.name] = f"{field.name}.bytes"
    if wanted is not None and wanted not in found:
        raise DataError(
            f"{path} has no column {wanted} of bytes; --image-column may be {', '.join(found) or 'none: there is no'}"
        )
    if wanted is None and len(found) != 1:
        remedy = "choose one with --image-column" if found else "give files with a column of bytes, or {bytes, path}"
        raise DataError(
            f"{path} has {len(found)} columns that may be images ({', '.join(found or schema.names)}); {remedy}"
        )
    return found[wanted or next(iter(found))]


def _label_column(names: list[str], features: dict[str, dict[str, Any]], wanted: str | None, path: Path) -> str | None:
    if wanted is not None and wanted not in names:
        raise DataError(f"{path} has no column {wanted}; --label-column may be one of {', '.join(names)}")
    if wanted is not None or "label" in names:
        return wanted or "label"
    classes = [name for name in names if name in features]
    if len(classes) > 1:
        raise DataError(f"{path} has several columns of classes ({', '.join(classes)}); choose one with --label-column")
    return classes[0] if classes else None


def _numbers(files: list[_File]) -> tuple[list[str] | None, np.ndarray]:
    """Returns the class names, None without, and the labels of all rows, (N,) int64."""
    path, names = files[0].path, files[0].names
    rows = sum(rows for file in files for rows, _ in file.groups)
    values = [value for file in files for value in file.labels] or [None] * rows
    found = np.full(rows, NO_LABEL, dtype=np.int64)
    at = [row for row, value in enumerate(values) if value is not None]
    kinds = {type(values[row]) for row in at}
    if kinds <= {int}:
        numbers = [str(values[row]) for row in at if values[row] != NO_LABEL]
        at = [row for row in at if values[row] != NO_LABEL]
    elif kinds == {str}:
        numbers = [values[row] for row in at]
    else:
        kind = ", ".join(sorted(one.__name__ for one in kinds))
        raise DataError(f"{path}: column {files[0].label} holds {kind}; labels are whole numbers or names")
    classes, labels = numbered(list(zip(numbers, at, strict=True)), path, unit="row")
    found[at] = labels
    if names is not None and kinds == {int}:
        if found.max(initial=NO_LABEL) >= len(names):
            raise DataError(f"{path}: label {found.max()}, but {len(names)} class names; write the file again")
        return names, found
    return classes if at else None, found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = ["MAX_GROUP_BYTES", "Columns", "ParquetImages"]

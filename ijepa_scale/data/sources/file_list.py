"""Reads the images that a list names: a CSV file with labels or without, or a text file with one path per line."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import re
from pathlib import Path

import numpy as np

from ijepa_scale.data.formats import image_suffixes, is_data_image, is_image
from ijepa_scale.data.sources.labels import MAX_LABEL, NO_LABEL, differ_in_case, plain, same_to_readers, whole_number
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted
from ijepa_scale.regular_file import check_regular

logger = logging.getLogger(__name__)

_COLUMNS = ("path", "label")
_SEPARATORS = {";": "semicolon", "\t": "tab", "|": "bar"}
_LABELLED_LINE = re.compile(r".*\.(\w+)[\s,;]+\S+")  # like "a/1.jpg 3"
_SHOWN = 5  # warnings
_TRIED = 100  # lines of a list that are looked for on disk, where no suffix tells what they name

_Row = tuple[str, str, int]  # path, label ("" if the list has none), line number


class ListSource:
    """The images that a file lists, in its order. Relative paths are relative to the file's folder.

    A name that ends in .csv, or `as_csv`, means a CSV file. Its header, in any case, is `path,label`, other columns are
    ignored, or `path` alone for images without labels. Labels are either all whole numbers from 0, in any spelling
    (`1`, `01`, `1.0`), which are used unchanged, or all class names, which are numbered in sorted order. Spaces and
    quotes around a label don't count.

    Any other file is a text with one path per line, as it is written, of images without labels.

    Raises:
        DataError: the list can't be read, or has mistakes. A missing image is found when it is read.
    """

    def __init__(self, path: str | Path, *, as_csv: bool = False) -> None:
        self._list = Path(path)
        as_csv = as_csv or self._list.suffix.lower() == ".csv"
        rows = _csv_rows(self._list) if as_csv else _text_rows(self._list)
        self._labelled = rows[0][1] != ""
        self.classes: list[str] | None = None
        labels = [NO_LABEL] * len(rows)
        if self._labelled:
            self.classes, labels = numbered([(label, line) for _, label, line in rows], self._list)
        self._labels = np.array(labels, dtype=np.int64)
        self._names = Names.of(name for name, _, _ in rows)
        self.num_samples = len(rows)
        self.shard_sizes = np.array([len(rows)], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.tobytes())
        for content in (self._names.ends, self._labels):
            digest.update(content.tobytes())
        digest.update("\n".join(self.classes or ()).encode())
        self.fingerprint = digest.hexdigest()
        self.origin = f"{'CSV' if as_csv else 'list'} {os.path.abspath(self._list)}"

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            SampleError: it is missing, isn't a regular file, is empty or too large.
            DataError: the file can't be read.
        """
        return read_image_file(self.name(sample_id))

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 if the list has none."""
        return int(self._labels[sample_id])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if the list has none."""
        return self._labels

    def name(self, sample_id: int) -> str:
        """Returns the image's path."""
        return str(self._list.parent / self._names[sample_id])

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single files are not prefetched."""

    def summary(self) -> str:
        """Returns the number of images, whether they have labels, and the list's path, for the log."""
        return f"{counted(self.num_samples, 'image')}{'' if self._labelled else ' without labels'} in {self._list}"

    def problems(self) -> Problems:
        """Returns no problems: a bad file is only found when it is read."""
        return Problems()


def _csv_rows(path: Path) -> list[_Row]:
    """Returns the rows of a CSV file."""
    rows: list[_Row] = []
    first: dict[str, _Row] = {}  # by path
    try:
        check_regular(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            header = [name.strip().casefold() for name in next(reader, [])]
            columns = _columns(header, path)
            for cells in filter(None, reader):
                where = f"{path}, line {reader.line_num}: {cells}"
                row = (*_row(cells, header, columns, where), reader.line_num)
                same = first.setdefault(os.path.normpath(row[0]), row)
                numbers = whole_number(same[1]), whole_number(row[1])
                if same[1] != row[1] and (None in numbers or numbers[0] != numbers[1]):
                    raise DataError(
                        f"{path} gives {row[0]} the labels {same[1]!r} and {row[1]!r} (lines {same[2]} and {row[2]}); "
                        "keep one"
                    )
                rows.append(row)
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); give a CSV file with path,label") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't a CSV file ({error}); save it as UTF-8 with path,label") from None
    except csv.Error as error:
        where = f"line {reader.line_num}: {error}"
        raise DataError(f"{path} isn't a CSV file ({where}); save it as UTF-8 with path,label") from None
    if not rows:
        raise DataError(f"{path} lists no images; add lines with {','.join(header)}")
    return rows


def _columns(header: list[str], path: Path) -> list[int]:
    """Returns where the paths and, if there are any, the labels are."""
    if header != ["path"] and not set(_COLUMNS) <= set(header):
        raise DataError(f"{path} begins with {header}; {_about_header(header)}")
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]} twice; keep one")
    return [header.index(name) for name in _COLUMNS if name in header]


def _about_header(header: list[str]) -> str:
    """Returns what to do about the first line of a CSV that lacks a column."""
    for separator, name in _SEPARATORS.items():
        if set(_COLUMNS) <= {cell.strip(" \"'") for each in header for cell in each.split(separator)}:
            return f"its cells end at {name}s; separate them by commas"
    return "its first line must name columns path and label, or path alone if the images have no labels"


def _row(cells: list[str], header: list[str], columns: list[int], where: str) -> tuple[str, str]:
    """Returns the path and the label of a line, "" if the list has none. `where` names the line."""
    found = [cells[column].strip() if column < len(cells) else "" for column in columns]
    name, label = found[0], "".join(map(plain, found[1:]))
    if not name or len(columns) > 1 and not label or "\0" in name:
        raise DataError(f"{where} lacks a path or a label; add it")
    if any(cells[len(header) :]):
        raise DataError(
            f"{where} has {len(cells)} cells, the first line {len(header)}; put a path or label with a comma into "
            'quotes (")'
        )
    return name, label


def _text_rows(path: Path) -> list[_Row]:
    """Returns the lines of a text file, whose paths may hold any bytes but NUL and line ends."""
    try:
        check_regular(path)
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(
            f"list {path} can't be read ({error.strerror}); give a text file with one path per line, or a .csv"
        ) from None
    if b"\0" in content:
        raise DataError(f"list {path} isn't a text in UTF-8; save it as one, with one path per line")
    lines = [os.fsdecode(line.removesuffix(b"\r")) for line in content.split(b"\n")]
    rows = [(line, "", number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError(f"list {path} names no images; write one path per line")
    first = [name.strip() for name in rows[0][0].split(",")]
    if "path" in first:
        raise DataError(f"list {path} begins like a CSV file ({rows[0][0]!r}); give it a name that ends in .csv")
    for line, _, number in rows:
        labelled = None if is_image(line) else _LABELLED_LINE.fullmatch(line)
        if labelled is not None and labelled[1].lower() in image_suffixes():
            raise DataError(
                f"list {path}, line {number}: {line!r} has something after the path; write a CSV with path,label for "
                "images with labels, else paths only"
            )
    is_read = any(is_image(line) or is_data_image(line) for line, _, _ in rows)
    if not is_read and not any(_is_there(path.parent, line) for line, _, _ in rows[:_TRIED]):
        raise DataError(
            f"{path} is a text file, not a list of images: none of its {counted(len(rows), 'line')} names one that is "
            f"read (the first is {rows[0][0][:60]!r}); give a text file with one path per line, or a .csv"
        )
    return rows


def _is_there(folder: Path, name: str) -> bool:
    try:
        return os.path.lexists(folder / name)
    except (OSError, ValueError):
        return False


def numbered(labels: list[tuple[str, int]], path: Path, unit: str = "line") -> tuple[list[str] | None, list[int]]:
    """Returns the class names, None if the labels are numbers, and the labels as numbers.

    `labels` are texts, each with the number of its line, or of another `unit`, in `path`.

    Raises:
        DataError: a number is out of range, numbers are mixed with names, or two names read the same.
    """
    line_of: dict[str, int] = {}
    for text, line in labels:
        line_of.setdefault(text, line)
    number_of = {text: whole_number(text) for text in line_of}
    numbers = {text: number for text, number in number_of.items() if number is not None}
    for text, number in numbers.items():
        if not 0 <= number <= MAX_LABEL:
            raise DataError(
                f"{path} has the label {text[:20]}; labels are below {MAX_LABEL + 1} and not below 0 "
                f"({unit} {line_of[text]})"
            )
    if len(numbers) == len(line_of):
        return None, [numbers[text] for text, _ in labels]
    names = [text for text in line_of if text not in numbers]
    if numbers:
        first = next(iter(numbers))
        raise DataError(
            f"{path} has labels {first!r} and {names[0]!r}; use either only numbers or only names "
            f"({unit}s {line_of[first]} and {line_of[names[0]]})"
        )
    same = same_to_readers(names)
    if same is not None:
        raise DataError(
            f"{path} has labels {same[0]!a} and {same[1]!a}, which read the same; spell them alike "
            f"({unit}s {line_of[same[0]]} and {line_of[same[1]]})"
        )
    for one, other in differ_in_case(names)[:_SHOWN]:
        logger.warning(
            "%s: classes %r and %r (%ss %d and %d) differ in case only; check that both are meant",
            path, one, other, unit, line_of[one], line_of[other],
        )  # fmt: skip
    classes = sorted(names)
    position_of = {name: position for position, name in enumerate(classes)}
    return classes, [position_of[text] for text, _ in labels]


__all__ = ["ListSource", "numbered"]

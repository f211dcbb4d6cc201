"""Reads image files from class folders and CSV lists, to be made into shards. Doesn't decode them."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.labels import MAX_LABEL, differ_in_case, plain, same_to_readers, whole_number
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError
from ijepa_scale.regular_file import check_regular

logger = logging.getLogger(__name__)

_COLUMNS = ("path", "label")
_SEPARATORS = {";": "semicolon", "\t": "tab", "|": "bar"}
_SHOWN = 5  # warnings


class FolderImages(ImageFolderSource):
    """Images in class folders ROOT/CLASS/*, or ROOT/SPLIT/CLASS/*; see `ImageFolderSource`."""

    def __init__(self, root: str | Path, split: str | None = None) -> None:
        super().__init__(root if split is None else os.path.join(root, split))
        self.origin = f"class folders {os.path.abspath(self.root)}"


class CsvImages:
    """The images that a CSV file lists, in its order. The header is `path,label`; other columns are ignored.

    The header may be in any case. Relative paths are relative to the CSV's folder. Labels are either all whole numbers
    from 0, in any spelling (`1`, `01`, `1.0`), which are used unchanged, or all class names, which are numbered in
    sorted order. Spaces and quotes around a label don't count.
    """

    def __init__(self, path: str | Path) -> None:
        self._csv = Path(path)
        rows = self._rows()
        self.classes, labels = _numbered([(label, line) for _, label, line in rows], self._csv)
        self._labels = np.array(labels, dtype=np.int64)
        self._names = Names.of(name for name, _, _ in rows)
        self.num_samples = len(rows)
        self.shard_sizes = np.array([len(rows)], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.tobytes())
        for content in (self._names.ends, self._labels):
            digest.update(content.tobytes())
        digest.update("\n".join(self.classes or ()).encode())
        self.fingerprint = digest.hexdigest()
        self.origin = f"CSV {os.path.abspath(self._csv)}"

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            SampleError: it can't be part of a shard.
            DataError: the file can't be read.
        """
        return read_image_file(self.name(sample_id))

    def label(self, sample_id: int) -> int:
        """Returns the label."""
        return int(self._labels[sample_id])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64."""
        return self._labels

    def name(self, sample_id: int) -> str:
        """Returns the image's path."""
        return str(self._csv.parent / self._names[sample_id])

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single files are not prefetched."""

    def summary(self) -> str:
        """Returns the number of images and the CSV's path, for the log."""
        return f"{self.num_samples} images in {self._csv}"

    def problems(self) -> Problems:
        """Returns no problems: a bad file is only found when it is read."""
        return Problems()

    def _rows(self) -> list[tuple[str, str, int]]:
        """Returns (path, label, line number) of each line."""
        rows: list[tuple[str, str, int]] = []
        first: dict[str, tuple[str, str, int]] = {}  # by path
        try:
            check_regular(self._csv)
            with self._csv.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, strict=True, skipinitialspace=True)
                header = [name.strip().casefold() for name in next(reader, [])]
                if not set(_COLUMNS) <= set(header):
                    raise DataError(f"{self._csv} begins with {header}; {_about_header(header)}")
                twice = [name for name in _COLUMNS if header.count(name) > 1]
                if twice:
                    raise DataError(f"{self._csv} has the column {twice[0]} twice; keep one")
                columns = [header.index(name) for name in _COLUMNS]
                for cells in filter(None, reader):
                    name, label = (cells[column].strip() if column < len(cells) else "" for column in columns)
                    if not name or not plain(label) or "\0" in name:
                        raise DataError(f"{self._csv}, line {reader.line_num}: {cells} lacks a path or a label; add it")
                    if any(cells[len(header) :]):
                        raise DataError(
                            f"{self._csv}, line {reader.line_num}: {cells} has {len(cells)} cells, the first line "
                            f'{len(header)}; put a path or label with a comma into quotes (")'
                        )
                    row = (name, plain(label), reader.line_num)
                    same = first.setdefault(os.path.normpath(name), row)
                    numbers = whole_number(same[1]), whole_number(row[1])
                    if same[1] != row[1] and (None in numbers or numbers[0] != numbers[1]):
                        raise DataError(
                            f"{self._csv} gives {name} the labels {same[1]!r} and {row[1]!r} (lines {same[2]} and "
                            f"{row[2]}); keep one"
                        )
                    rows.append(row)
        except OSError as error:
            raise DataError(f"{self._csv} can't be read ({error.strerror}); give a CSV file with path,label") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self._csv} isn't a CSV file ({error}); save it as UTF-8 with path,label") from None
        except csv.Error as error:
            where = f"line {reader.line_num}: {error}"
            raise DataError(f"{self._csv} isn't a CSV file ({where}); save it as UTF-8 with path,label") from None
        if not rows:
            raise DataError(f"{self._csv} lists no images; add lines with path,label")
        return rows


def _about_header(header: list[str]) -> str:
    """Returns what to do about the first line of a CSV that lacks a column."""
    for separator, name in _SEPARATORS.items():
        if set(_COLUMNS) <= {cell.strip(" \"'") for each in header for cell in each.split(separator)}:
            return f"its cells end at {name}s; separate them by commas"
    return "its first line must name columns path and label"


def _numbered(labels: list[tuple[str, int]], path: Path) -> tuple[list[str] | None, list[int]]:
    """Returns the class names (None if the labels are numbers) and the labels as numbers; takes texts with lines."""
    line_of: dict[str, int] = {}
    for text, line in labels:
        line_of.setdefault(text, line)
    number_of = {text: whole_number(text) for text in line_of}
    numbers = {text: number for text, number in number_of.items() if number is not None}
    for text, number in numbers.items():
        if not 0 <= number <= MAX_LABEL:
            raise DataError(
                f"{path} has the label {text[:20]}; labels are below {MAX_LABEL + 1} and not below 0 "
                f"(line {line_of[text]})"
            )
    if len(numbers) == len(line_of):
        return None, [numbers[text] for text, _ in labels]
    names = [text for text in line_of if text not in numbers]
    if numbers:
        first = next(iter(numbers))
        raise DataError(
            f"{path} has labels {first!r} and {names[0]!r}; use either only numbers or only names "
            f"(lines {line_of[first]} and {line_of[names[0]]})"
        )
    same = same_to_readers(names)
    if same is not None:
        raise DataError(
            f"{path} has labels {same[0]!a} and {same[1]!a}, which read the same; spell them alike "
            f"(lines {line_of[same[0]]} and {line_of[same[1]]})"
        )
    for one, other in differ_in_case(names)[:_SHOWN]:
        logger.warning(
            "%s: classes %r and %r (lines %d and %d) differ in case only; check that both are meant",
            path, one, other, line_of[one], line_of[other],
        )  # fmt: skip
    classes = sorted(names)
    position_of = {name: position for position, name in enumerate(classes)}
    return classes, [position_of[text] for text, _ in labels]


__all__ = ["CsvImages", "FolderImages"]

"""Reads image files from class folders and CSV lists, to be made into shards. Doesn't decode them."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError

_COLUMNS = ("path", "label")
_LABELS = 2**31  # labels must be below this to fit into an index


class FolderImages(ImageFolderSource):
    """Images in class folders ROOT/CLASS/*, or ROOT/SPLIT/CLASS/*; see `ImageFolderSource`."""

    def __init__(self, root: str | Path, split: str | None = None) -> None:
        super().__init__(root if split is None else os.path.join(root, split))
        self.origin = f"class folders {os.path.abspath(self.root)}"


class CsvImages:
    """The images that a CSV file lists, in its order. The header is `path,label`; other columns are ignored.

    Relative paths are relative to the CSV's folder. Labels are either all integers from 0, which are used unchanged,
    or all class names, which are numbered in sorted order.
    """

    def __init__(self, path: str | Path) -> None:
        self._csv = Path(path)
        rows = self._rows()
        texts = [label for _, label in rows]
        self.classes, labels = _numbered(texts, self._csv)
        self._labels = np.array(labels, dtype=np.int64)
        self._names = Names.of(name for name, _ in rows)
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

    def _rows(self) -> list[tuple[str, str]]:
        """Returns (path, label) of each line."""
        rows = []
        try:
            with self._csv.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, strict=True)
                header = [name.strip() for name in next(reader, [])]
                if not set(_COLUMNS) <= set(header):
                    raise DataError(
                        f"{self._csv} begins with {header}; its first line must name columns path and label"
                    )
                columns = [header.index(name) for name in _COLUMNS]
                for cells in filter(None, reader):
                    name, label = (cells[column].strip() if column < len(cells) else "" for column in columns)
                    if not name or not label or "\0" in name:
                        raise DataError(f"{self._csv}, line {reader.line_num}: {cells} lacks a path or a label; add it")
                    rows.append((name, label))
        except OSError as error:
            raise DataError(f"{self._csv} can't be read ({error.strerror}); give a CSV file with path,label") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{self._csv} isn't a CSV file ({error}); save it as UTF-8 with path,label") from None
        if not rows:
            raise DataError(f"{self._csv} lists no images; add lines with path,label")
        return rows


def _numbered(texts: list[str], path: Path) -> tuple[list[str] | None, list[int]]:
    """Returns the class names (None if the labels are numbers) and the labels as numbers."""
    numbers = [text for text in texts if text.isascii() and text.isdigit()]
    if len(numbers) == len(texts):
        largest = max(numbers, key=lambda text: (len(text.lstrip("0")), text.lstrip("0")))
        if len(largest.lstrip("0")) > 10 or int(largest) >= _LABELS:
            raise DataError(f"{path} has the label {largest[:20]}; labels are below {_LABELS}")
        return None, [int(text) for text in texts]
    if numbers:
        name = next(text for text in texts if text not in set(numbers))
        raise DataError(f"{path} has labels {numbers[0]!r} and {name!r}; use either only numbers or only names")
    classes = sorted(set(texts))
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, [number_of[text] for text in texts]


__all__ = ["CsvImages", "FolderImages"]

"""Images to embed, numbered: files, folders, lists of paths, and the sources of training. Must not know any encoder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.contents import contents_of, digest_of_stats
from ijepa_scale.data.sources.open import build_source, reader_of
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.source import SampleSource, described
from ijepa_scale.data.sources.tar_index import is_tar
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.predictions import ImageFiles
from ijepa_scale.plurals import counted


class ImageSet:
    """Images in a fixed order.

    Attributes:
        fingerprint: changes with the list of images, and with the path, size or time of any of their files.
        problems: a line for each folder, shard or sample that couldn't be listed.
        num_lost: images that these lines stand for; a folder counts as one.
    """

    def __init__(
        self, source: SampleSource | None, files: Sequence[str], problems: Sequence[str], num_lost: int
    ) -> None:
        self._source, self._files, self.problems, self.num_lost = source, files, list(problems), num_lost
        self.fingerprint = digest_of_stats(files) if source is None else contents_of(source)
        if not len(self):
            raise DataError(self.problems[0] if self.problems else "no images to embed; name others")

    @property
    def described(self) -> str:
        """The images in words that are the same wherever their files are."""
        if self._source is not None:
            return described(self._source)
        names = "\n".join(f"{os.path.basename(name)} {_size(name)}" for name in self._files)
        return f"{counted(len(self), 'image')}, {hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}"

    @classmethod
    def of(cls, given: Sequence[str], reader: str | None = None) -> ImageSet:
        """Returns the images that are named: by a `reader` of training, or else by what they look like.

        Tars, patterns of tars and folders that hold tars are shards; a `.txt` file holds a path per line, relative to
        its folder; other files are images, and of other folders all images below them are taken.

        Raises:
            DataError: there are none, they can't be listed, or shards stand next to others.
        """
        shards = [path for path in given if _are_shards(path)]
        if reader is not None or shards:
            if len(given) > 1:
                raise DataError(
                    f"{given[0]} and {given[1]}: shards and readers take one pattern; embed them one by one"
                )
            source = build_source(reader or "shards", given[0])
            found = source.problems()
            return cls(source, (), [f"{each.name}: {each.reason}" for each in found.named], found.counts.total())
        listed = [line for path in given for line in (_lines(path) if path.endswith(".txt") else [path])]
        files = ImageFiles(listed)
        return cls(None, files.files, files.problems, len(files.problems))

    def __len__(self) -> int:
        return len(self._files) if self._source is None else self._source.num_samples

    def read(self, number: int) -> bytes | np.ndarray:
        """Returns an encoded image, or its pixels.

        Raises:
            DataError: it can't be read.
        """
        return read_image_file(self._files[number]) if self._source is None else self._source.read(number)

    def name(self, number: int) -> str:
        """Returns an image's path, or its name in a shard."""
        return self._files[number] if self._source is None else self._source.name(number)


def _size(name: str) -> int | None:
    with contextlib.suppress(OSError):
        return os.path.getsize(name)
    return None


def _are_shards(path: str) -> bool:
    return reader_of(path) == "shards" if os.path.isdir(path) else is_tar(path)


def _lines(path: str) -> list[str]:
    """Returns the paths in a list, relative to its folder."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"list {path} can't be read ({error.strerror}); check the path") from None
    names = [os.fsdecode(line) for line in text.splitlines() if line.strip()]
    return [os.path.join(os.path.dirname(path), name) for name in names]

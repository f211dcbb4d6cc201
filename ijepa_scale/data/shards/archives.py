"""What reading images from an archive means, whatever its format: names, classes, links. Doesn't decode images.

The same rules choose or refuse classes as in `ImageFolderSource`. Members are read in place; nothing is extracted.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.shards.archive_members import ArchiveMembers
from ijepa_scale.data.sources.cache import Handle
from ijepa_scale.data.sources.labels import NO_LABEL
from ijepa_scale.data.sources.listing import (
    ALL_IMAGES,
    AS_CLASSES,
    NO_CLASS,
    check_lone,
    chosen_split,
    describe_unlabelled,
    doubt_classes,
    few,
    has_no_classes,
    no_images,
    refuse_nested,
)
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted


class ArchiveImages:
    """The images of an archive, numbered in the order that the unpacked folders would have.

    `split` names the folder in the archive whose sub-folders are classes, and the same rules as in `ImageFolderSource`
    choose or refuse a folder, or read all images without labels. If `split` ends in ".", the folders are always the
    classes; if it ends in "**", there are no labels.
    """

    kind: str  # of the archive, for messages
    wanted: str  # archive, for messages

    def __init__(self, path: str | Path, split: str | None = None, *, most_loose: float = 1.0) -> None:
        self._path = Path(path)
        self._file: Handle | None = None  # opened by each process at its first read
        self._problems = Problems()
        self._chosen: str | None = None  # split
        self._most_loose = most_loose
        self.classes: list[str] | None = None
        try:
            self._status = self._path.stat()
        except OSError as error:
            raise self._unreadable(error) from None
        if not stat.S_ISREG(self._status.st_mode):
            raise self._unreadable("not a regular file")
        found = self._list()
        folder = self._class_folder(found, split)
        found.report(folder, self._problems)
        self._take(folder, found, asked=(split or "").rpartition("/")[2])
        self.origin = f"{self.kind} {os.path.abspath(self._path)}" + (f", folder {folder}" if folder else "")

    def _list(self) -> ArchiveMembers:
        """Returns the members.

        Raises:
            DataError: the archive can't be read, or isn't whole.
        """
        raise NotImplementedError

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            DataError: the archive can't be read or has changed since it was listed.
        """
        try:
            if self._file is None:
                self._file = Handle(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
            status = os.fstat(self._file.descriptor)
            listed = self._status
            if (status.st_size, status.st_mtime_ns) != (listed.st_size, listed.st_mtime_ns):
                raise self._changed()
            return self._bytes(self._file.descriptor, self._where[sample_id].tolist())
        except OSError as error:
            raise DataError(f"{self._path} can't be read ({error.strerror}); check the disk") from None

    def _bytes(self, descriptor: int, where: list[int]) -> bytes:
        """Returns a member's content."""
        raise NotImplementedError

    def _unreadable(self, why: object) -> DataError:
        return DataError(f"{self._path} isn't a readable {self.kind} ({why}); give {self.wanted}")

    def _changed(self) -> DataError:
        return DataError(f"{self._path} has changed since it was listed; start again in an empty folder")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        handle = getattr(self, "_file", None)
        if handle is not None:
            handle.close()

    def label(self, sample_id: int) -> int:
        """Returns the class's number; -1 if there are no labels."""
        return int(self._labels[sample_id])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there are none."""
        return self._labels

    def name(self, sample_id: int) -> str:
        """Returns the archive's path and the member's name; CLASS/NAME for a member of an inner tar CLASS.tar."""
        return f"{self._path}:{self._names[sample_id]}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: members are not prefetched."""

    def summary(self) -> str:
        """Returns what the archive was read as, for the log."""
        of = f", folder {self._chosen}, the only one of the splits there that is read" if self._chosen else ""
        if self.classes is None:
            return describe_unlabelled(self.num_samples, self._loose, str(self._path)) + of
        return f"{counted(self.num_samples, 'image')} in {counted(len(self.classes), 'class')} of {self._path}{of}"

    def problems(self) -> Problems:
        """Returns the members that can't be used."""
        return self._problems

    def _class_folder(self, found: ArchiveMembers, split: str | None) -> str:
        """Returns the folder whose images or sub-folders are read, with a trailing slash; '' for the archive itself."""
        parts = (split or "").split("/")
        folder = "".join(f"{part}/" for part in parts if part not in ("", AS_CLASSES, ALL_IMAGES))
        if split is not None and not any(name.startswith(folder) for name in found.images):
            raise DataError(
                f"{self._path} holds no image in a folder {split!r}; its folders are {few(found.folders_in(''))}"
            )
        if parts[-1] in (AS_CLASSES, ALL_IMAGES):
            return folder
        chosen = chosen_split(found.folders_in(folder), str(self._path), _giver(folder))
        if chosen is not None:
            self._chosen, folder = chosen, f"{folder}{chosen}/"
            refuse_nested(found.folders_in(folder), f"folder {folder} of {self._path}", _giver(folder))
        return folder

    def _take(self, folder: str, found: ArchiveMembers, *, asked: str) -> None:
        """Numbers the images in `folder`; `asked` may be `AS_CLASSES` or `ALL_IMAGES`."""
        top_of = {
            name: name[len(folder) :].rpartition("/")[0].partition("/")[0]
            for name in found.images
            if name.startswith(folder)
        }
        loose = [name for name, top in top_of.items() if not top]
        inside, self._loose = len(top_of) - len(loose), len(loose)
        unlabelled = asked != AS_CLASSES and has_no_classes(len(loose), inside, self._most_loose)
        if unlabelled or asked == ALL_IMAGES:
            names, classes = list(top_of), [""]
            if asked != ALL_IMAGES and inside:
                doubt = doubt_classes(str(self._path), len(loose), inside, _giver(folder))
                self._problems.doubts.append(doubt)
        else:
            for name in loose:
                self._problems.add("no class", f"{self._path}:{name}", NO_CLASS)
            names = [name for name, top in top_of.items() if top]
            classes = self.classes = self._check_classes(folder, found, {top_of[name] for name in names}, asked)
        names.sort(key=lambda name: (top_of[name], *name.rpartition("/")[::2]))
        number_of = {name: number if self.classes else NO_LABEL for number, name in enumerate(classes)}
        self._labels = np.array([number_of.get(top_of[name], NO_LABEL) for name in names], dtype=np.int64)
        self._where = np.array([found.images[name] for name in names], dtype=np.int64)
        self._names = Names.of(names)
        self.num_samples = len(names)
        self.shard_sizes = np.array([len(names)], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.tobytes())
        for array in (self._names.ends, *self._where.T):
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()

    def _check_classes(self, folder: str, found: ArchiveMembers, filled: set[str], asked: str) -> list[str]:
        """Returns the classes, each of which must be among the `filled` folders."""
        found.check_classes(folder, self._problems)
        classes = found.folders_in(folder)
        if asked != AS_CLASSES:
            nested = any(name.startswith(folder) and name.count("/", len(folder)) > 1 for name in found.images)
            check_lone(classes, nested, str(self._path), _giver(folder))
        if not filled:
            raise DataError(
                f"{self._path} holds no images in class folders, and none outside them; give a {self.kind} of images, "
                "or unpack it and list the files in a CSV"
            )
        empty = sorted(set(classes) - filled)
        if empty:
            raise no_images(f"{self._path}:{folder}{empty[0]}", self._problems, _giver(folder))
        return classes


def _giver(folder: str) -> Callable[[str], str]:
    """Returns a function that says what to give for a folder in `folder`."""
    return lambda name: f"--split {folder}{name}"


__all__ = ["ArchiveImages"]

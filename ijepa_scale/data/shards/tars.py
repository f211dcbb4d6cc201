"""Reads images from one tar, to be made into shards: CLASS/*.jpg members, or a tar of tars. Doesn't decode them.

Members are read in place, by offset; nothing is extracted. A member X.tar counts as a folder X, so the inner tars of
the official ILSVRC2012_img_train.tar are its classes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.shards.image_files import check_size
from ijepa_scale.data.sources.cache import Handle
from ijepa_scale.data.sources.folder import FOLDER_SUFFIXES, SPLITS
from ijepa_scale.data.sources.scan import IRREGULAR, Break, Problems, leaves_its_folder, walk_members
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError, SampleError

_Span = tuple[int, int]  # offset and size in bytes


class TarImages:
    """The images of a tar, numbered class by class in the order that the unpacked folders would have.

    `split` names the folder in the tar whose sub-folders are classes; '.' is the tar itself. The default is train/ if
    the tar holds only splits (train, val, test), else the tar itself.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self._path = Path(path)
        self._file: Handle | None = None  # opened by each process at its first read
        self._problems = Problems()
        members: dict[str, _Span] = {}  # if a name appears twice, the later one counts, as when tar extracts
        try:
            self._status = self._path.stat()
            with self._path.open("rb") as file:
                whole = (0, self._status.st_size)
                inner: dict[str, _Span] = {}
                self._check(
                    walk_members(file, self._collector("", members, inner=inner), end=whole[1]), str(self._path)
                )
                for name, (offset, size) in inner.items():
                    use = self._collector(f"{name.removesuffix('.tar')}/", members, inner=None)
                    broken = walk_members(file, use, begin=offset, end=offset + size)
                    self._check(broken, f"{self._path}:{name}")
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._path} isn't a readable tar ({error}); give a complete, uncompressed one") from None
        folder = self._class_folder(members, split)
        self._take(folder, members)
        self.origin = f"tar {os.path.abspath(self._path)}" + (f", folder {folder}" if folder else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        handle = getattr(self, "_file", None)
        if handle is not None:
            handle.close()

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            DataError: the tar can't be read or has changed since it was listed.
        """
        size = int(self._sizes[sample_id])
        try:
            if self._file is None:
                self._file = Handle(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
            status = os.fstat(self._file.descriptor)
            data = os.pread(self._file.descriptor, size, int(self._offsets[sample_id]))
        except OSError as error:
            raise DataError(f"{self._path} can't be read ({error.strerror}); check the disk") from None
        listed = self._status
        if len(data) != size or (status.st_size, status.st_mtime_ns) != (listed.st_size, listed.st_mtime_ns):
            raise DataError(f"{self._path} has changed since it was listed; start again in an empty folder")
        return data

    def label(self, sample_id: int) -> int:
        """Returns the class's number."""
        return int(self._labels[sample_id])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64."""
        return self._labels

    def name(self, sample_id: int) -> str:
        """Returns the tar's path and the member's name; CLASS/NAME for a member of an inner tar CLASS.tar."""
        return f"{self._path}:{self._names[sample_id]}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: members are not prefetched."""

    def summary(self) -> str:
        """Returns the number of images and classes, for the log."""
        return f"{self.num_samples} images in {len(self.classes or ())} classes of {self._path}"

    def problems(self) -> Problems:
        """Returns the members that can't be used."""
        return self._problems

    def _collector(
        self, prefix: str, members: dict[str, _Span], *, inner: dict[str, _Span] | None
    ) -> Callable[[tarfile.TarFile, tarfile.TarInfo], None]:
        """Returns a function that adds images to `members`, named `prefix` + NAME, and tars to `inner` if given."""

        def use(_: tarfile.TarFile, member: tarfile.TarInfo) -> None:
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            is_tar = member.name.lower().endswith(".tar") and inner is not None
            if member.isdir() or not parts or any(part.startswith(".") and part != ".." for part in parts):
                return
            if not is_tar and not member.name.lower().endswith(FOLDER_SUFFIXES):
                return
            name = prefix + "/".join(parts)
            if leaves_its_folder(member.name):
                self._problems.add("unsafe name", f"{self._path}:{prefix}{member.name}", "leaves its folder")
            elif not member.isreg() or member.issparse():
                self._problems.add("link or device", f"{self._path}:{name}", IRREGULAR)
            elif is_tar:
                assert inner is not None
                inner[name] = (member.offset_data, member.size)
            else:
                try:
                    check_size(member.size)
                except SampleError as error:
                    self._problems.add(error.kind, f"{self._path}:{name}", str(error))
                else:
                    members[name] = (member.offset_data, member.size)

        return use

    def _check(self, broken: Break | None, name: str) -> None:
        if broken is not None:
            raise DataError(
                f"{name} is cut short or damaged after byte {broken.byte} ({broken.reason}); copy it again: "
                "a set made from it would be incomplete"
            )

    def _class_folder(self, members: dict[str, _Span], split: str | None) -> str:
        """Returns the folder in the tar whose sub-folders are classes, with a trailing slash; '' for the tar itself."""
        parts = [name.split("/") for name in members]
        tops = {part[0] for part in parts if len(part) > 1}
        if split is not None:
            folder = "".join(f"{part}/" for part in split.split("/") if part not in ("", "."))
            if not any(name.startswith(folder) for name in members):
                raise DataError(f"{self._path} holds no image in a folder {split!r}; its folders are {_few(tops)}")
            return folder
        if "train" in tops and tops <= SPLITS:
            return "train/"
        if len(tops) == 1 and len({part[1] for part in parts if len(part) > 2}) > 1:
            top = tops.pop()
            raise DataError(
                f"all images of {self._path} are in its folder {top!r}; give --split {top} if the folders in it are "
                "the classes, or --split . if it is the only class"
            )
        return ""

    def _take(self, folder: str, members: dict[str, _Span]) -> None:
        """Numbers the images in `folder`."""
        inside = [name for name in members if name.startswith(folder)]
        for name in [name for name in inside if "/" not in name[len(folder) :]]:
            self._problems.add("no class", f"{self._path}:{name}", "isn't in a class folder; move it into one")
        named = [name for name in inside if "/" in name[len(folder) :]]
        if not named:
            raise DataError(
                f"{self._path} holds no images in class folders (CLASS/*.jpg members, or CLASS.tar with images in it); "
                "unpack it and list the files in a CSV"
            )
        named.sort(key=lambda name: (name[len(folder) :].partition("/")[0], *name.rpartition("/")[::2]))
        of_class = [name[len(folder) :].partition("/")[0] for name in named]
        classes = sorted(set(of_class))
        self.classes: list[str] | None = classes
        number_of = {name: number for number, name in enumerate(classes)}
        self._labels = np.array([number_of[name] for name in of_class], dtype=np.int64)
        spans = np.array([members[name] for name in named], dtype=np.int64)
        self._offsets, self._sizes = spans[:, 0].copy(), spans[:, 1].copy()
        self._names = Names.of(named)
        self.num_samples = len(named)
        self.shard_sizes = np.array([len(named)], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.tobytes())
        for array in (self._names.ends, self._offsets, self._sizes):
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()


def _few(names: set[str]) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"


__all__ = ["TarImages"]

"""Reads images from one tar, to be made into shards: CLASS/*.jpg members, or a tar of tars. Doesn't decode them.

Members are read in place, by offset; nothing is extracted. A member X.tar counts as a folder X, so the inner tars of
the official ILSVRC2012_img_train.tar are its classes.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.formats import is_image, junk
from ijepa_scale.data.sources.cache import Handle
from ijepa_scale.data.sources.listing import NO_CLASS, check_lone, chosen_split, few, no_images, refuse_nested
from ijepa_scale.data.sources.read_file import check_size
from ijepa_scale.data.sources.scan import IRREGULAR, Break, Problems, leaves_its_folder, walk_members
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError, SampleError

_UNSAFE = "unsafe name"

_Span = tuple[int, int]  # offset and size in bytes


class TarImages:
    """The images of a tar, numbered class by class in the order that the unpacked folders would have.

    `split` names the folder in the tar whose sub-folders are classes, and the same rules choose or refuse a folder as
    in `ImageFolderSource`. If `split` ends in ".", the folders are always the classes.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self._path = Path(path)
        self._file: Handle | None = None  # opened by each process at its first read
        self._problems = Problems()
        self._chosen: str | None = None  # split
        found = _Members(self._path)
        try:
            self._status = self._path.stat()
            if not stat.S_ISREG(self._status.st_mode):
                raise ValueError("not a regular file")
            with self._path.open("rb") as file:
                inner: dict[str, _Span] = {}
                self._check(
                    walk_members(file, found.collector("", inner=inner), end=self._status.st_size), str(self._path)
                )
                for name, (offset, size) in inner.items():
                    use = found.collector(f"{name.removesuffix('.tar')}/", inner=None)
                    broken = walk_members(file, use, begin=offset, end=offset + size)
                    self._check(broken, f"{self._path}:{name}")
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._path} isn't a readable tar ({error}); give a complete, uncompressed one") from None
        folder = self._class_folder(found, split)
        found.report(folder, self._problems)
        self._take(folder, found)
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
        of = f", folder {self._chosen}, the only one of the splits there that is read" if self._chosen else ""
        return f"{self.num_samples} images in {len(self.classes or ())} classes of {self._path}{of}"

    def problems(self) -> Problems:
        """Returns the members that can't be used."""
        return self._problems

    def _check(self, broken: Break | None, name: str) -> None:
        if broken is not None:
            raise DataError(
                f"{name} is cut short or damaged after byte {broken.byte} ({broken.reason}); copy it again: "
                "a set made from it would be incomplete"
            )

    def _class_folder(self, found: _Members, split: str | None) -> str:
        """Returns the folder in the tar whose sub-folders are classes, with a trailing slash; '' for the tar itself."""
        parts = (split or "").split("/")
        folder = "".join(f"{part}/" for part in parts if part not in ("", "."))
        if split is not None and not any(name.startswith(folder) for name in found.images):
            raise DataError(
                f"{self._path} holds no image in a folder {split!r}; its folders are {few(found.folders_in(''))}"
            )
        if parts[-1] == ".":
            return folder
        chosen = chosen_split(found.folders_in(folder), str(self._path), lambda name: f"--split {folder}{name}")
        if chosen is not None:
            self._chosen, folder = chosen, f"{folder}{chosen}/"
            inside = f"folder {folder} of {self._path}"
            refuse_nested(found.folders_in(folder), inside, lambda name: f"--split {folder}{name}")
        nested = any(name.startswith(folder) and name.count("/", len(folder)) > 1 for name in found.images)
        check_lone(found.folders_in(folder), nested, str(self._path), lambda name: f"--split {folder}{name}")
        return folder

    def _take(self, folder: str, found: _Members) -> None:
        """Numbers the images in `folder`."""
        members = found.images
        inside = [name for name in members if name.startswith(folder)]
        for name in [name for name in inside if "/" not in name[len(folder) :]]:
            self._problems.add("no class", f"{self._path}:{name}", NO_CLASS)
        named = [name for name in inside if "/" in name[len(folder) :]]
        if not named:
            raise DataError(
                f"{self._path} holds no images in class folders (CLASS/*.jpg members, or CLASS.tar with images in it); "
                "unpack it and list the files in a CSV"
            )
        named.sort(key=lambda name: (name[len(folder) :].partition("/")[0], *name.rpartition("/")[::2]))
        of_class = [name[len(folder) :].partition("/")[0] for name in named]
        classes = found.folders_in(folder)
        empty = sorted(set(classes) - set(of_class))
        if empty:
            raise no_images(f"{self._path}:{folder}{empty[0]}", self._problems)
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


class _Members:
    """What a tar holds, by name: images, folders, and what can't be read or isn't an image."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.images: dict[str, _Span] = {}  # if a name appears twice, the later one counts, as when tar extracts
        self._folders: set[str] = set()
        self._bad: dict[str, tuple[str, str]] = {}  # name -> kind and reason
        self._junk: dict[str, str] = {}  # name -> what it is counted as
        self._others: set[str] = set()

    def folders_in(self, folder: str) -> list[str]:
        """Returns the sorted names of the folders in a folder, which has a trailing slash or is ''."""
        inside = {name[len(folder) :].partition("/")[0] for name in self._folders if name.startswith(folder)}
        return sorted(inside - {""})

    def report(self, folder: str, problems: Problems) -> None:
        """Adds what can't be used or was passed over in a folder, and unsafe names in any."""
        for name, (kind, reason) in self._bad.items():
            if name.startswith(folder) or kind == _UNSAFE:
                problems.add(kind, f"{self._path}:{name}", reason)
        for name, kind in self._junk.items():
            if name.startswith(folder):
                problems.skipped[kind] += 1
        for name in self._others:
            if name.startswith(folder):
                problems.pass_over(name.rpartition("/")[2])

    def collector(
        self, prefix: str, *, inner: dict[str, _Span] | None
    ) -> Callable[[tarfile.TarFile, tarfile.TarInfo], None]:
        """Returns a function that takes members, named `prefix` + NAME, and adds tars to `inner` if given."""
        self._folders.add(prefix.rstrip("/"))

        def use(_: tarfile.TarFile, member: tarfile.TarInfo) -> None:
            if leaves_its_folder(member.name):
                if is_image(member.name) or member.name.lower().endswith(".tar"):
                    self._bad[prefix + member.name] = _UNSAFE, "leaves its folder"
                return
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            for number, part in enumerate(parts):
                useless = junk(part)
                if useless is not None:
                    self._junk[prefix + "/".join(parts[: number + 1])] = useless
                    return
            if parts:
                self._add(prefix + "/".join(parts), member, inner)

        return use

    def _add(self, name: str, member: tarfile.TarInfo, inner: dict[str, _Span] | None) -> None:
        self._folders.add(name if member.isdir() else name.rpartition("/")[0])
        is_tar = name.lower().endswith(".tar") and inner is not None
        if member.isdir():
            return
        if not is_tar and not is_image(name):
            self._others.add(name)
        elif not member.isreg() or member.issparse():
            self._bad[name] = "link or device", IRREGULAR
        elif is_tar:
            assert inner is not None
            inner[name] = (member.offset_data, member.size)
        else:
            try:
                check_size(member.size)
            except SampleError as error:
                self._bad[name] = error.kind, str(error)
            else:
                self.images[name] = (member.offset_data, member.size)


__all__ = ["TarImages"]

"""What an archive of images holds, whatever its format, and where its links lead. Knows nothing of bytes."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterable
from pathlib import Path

from ijepa_scale.data.formats import is_archive, is_image, junk
from ijepa_scale.data.sources.listing import doubt_archive, doubt_link, lost_link
from ijepa_scale.data.sources.read_file import check_size
from ijepa_scale.data.sources.scan import Problems, leaves_its_folder
from ijepa_scale.errors import SampleError

_UNSAFE = "unsafe name"
_IRREGULAR = "link or device"
_MOST_LINKS = 40  # followed one after another, as by Linux

Where = tuple[int, ...]  # what finds a member's bytes in its archive


class ArchiveMembers:
    """What an archive holds, by name: images, folders, and what can't be read or isn't an image."""

    def __init__(self, path: Path, remedy: str) -> None:
        """`remedy` says how to write the archive without links."""
        self._path, self._remedy = path, remedy
        self._irregular = f"a link, a device or sparse; {remedy}"
        self.images: dict[str, Where] = {}  # if a name appears twice, the later one counts, as when it is extracted
        self._folders: set[str] = set()
        self._bad: dict[str, tuple[str, str]] = {}  # name -> kind and reason
        self._links: dict[str, str] = {}  # name -> target
        self._junk: dict[str, str] = {}  # name -> what it is counted as
        self._others: set[str] = set()

    def usable(self, prefix: str, member: str) -> str | None:
        """Returns the plain name of a member of the folder `prefix`; None if it is unsafe or junk, which is counted."""
        if leaves_its_folder(member):
            if is_image(member) or is_archive(member):
                self._bad[prefix + member] = _UNSAFE, "leaves its folder"
            return None
        parts = [part for part in member.split("/") if part not in ("", ".")]
        for number, part in enumerate(parts):
            useless = junk(part)
            if useless is not None:
                self._junk[prefix + "/".join(parts[: number + 1])] = useless
                return None
        return prefix + "/".join(parts) if parts else None

    def add_folder(self, name: str) -> None:
        """Adds a folder."""
        self._folders.add(name)

    def add_link(self, name: str, target: str) -> None:
        """Adds a symbolic link."""
        self._folders.add(posixpath.dirname(name))
        if is_image(name):
            self._bad[name] = _IRREGULAR, self._irregular
        else:
            self._links[name] = target

    def add_file(self, name: str, where: Where | None, fault: tuple[str, str] | None = None) -> None:
        """Adds a file; `where` is None for a device. `fault` is the kind of what is wrong with it, and the reason."""
        self._folders.add(posixpath.dirname(name))
        if where is None:
            fault = _IRREGULAR, self._irregular
        if not is_image(name) and (where is not None or not is_archive(name)):
            self._others.add(name)
        elif fault is not None:
            self._bad[name] = fault
        else:
            assert where is not None
            self.images[name] = where

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
        for name in filter(lambda name: name.startswith(folder), self._links):
            if self._leads_into(folder, name):
                problems.skipped[f"link {name[len(folder) :]} to a folder that is listed anyway"] += 1
            elif self._leads_to_file(name):
                problems.pass_over(name.rpartition("/")[2])
            else:
                problems.add(_IRREGULAR, f"{self._path}:{name}", self._irregular)

    def check_classes(self, folder: str, problems: Problems) -> None:
        """Call if the folders in a folder are classes: notes what may be one and isn't read.

        Raises:
            DataError: a link in a class's place leads to nothing that can be read.
        """

        def in_place(names: Iterable[str]) -> list[str]:
            return sorted(name for name in names if name.startswith(folder) and "/" not in name[len(folder) :])

        for name in in_place(self._links):
            path = f"{self._path}:{name}"
            if self._leads_into(folder, name):
                problems.doubts.append(doubt_link(path))
            elif not self._leads_to_file(name):
                raise lost_link(path, self._remedy, f" in {folder or 'the archive'}")
        for name in in_place([*self._others, *self._bad]):
            if is_archive(name):
                problems.doubts.append(doubt_archive(f"{self._path}:{name}"))

    def _leads_into(self, folder: str, link: str) -> bool:
        """Returns whether a link leads to a folder in `folder`, to that itself or to one around it."""
        target = self._target(link)
        if target is None or target not in self._all_folders:
            return False
        return f"{target}/".startswith(folder) or target == "" or folder.startswith(f"{target}/")

    def _leads_to_file(self, link: str) -> bool:
        target = self._target(link)
        return target in self._others or target in self.images or target in self._bad

    @functools.cached_property
    def _all_folders(self) -> set[str]:
        """Returns the folders, and those around them."""
        found = {"", *self._folders}
        for name in self._folders:
            while name:
                name = posixpath.dirname(name)
                found.add(name)
        return found

    def _target(self, link: str) -> str | None:
        """Returns the name in the archive that a link leads to; None if it leads out of it or around in a circle."""
        name = link
        for _ in range(_MOST_LINKS):
            parts = name.split("/")
            through = next(
                (n for n in range(1, len(parts) + 1) if "/".join(parts[:n]) in self._links), None
            )  # the first part of the path that is a link
            if through is None:
                known = name in self._all_folders or name in self._others
                return "" if name == "." else name[:-4] if name.lower().endswith(".tar") and not known else name
            at = "/".join(parts[:through])
            name = posixpath.normpath(posixpath.join(posixpath.dirname(at), self._links[at], *parts[through:]))
            if set(name.split("/")) == {".."}:
                return ""  # around the archive, and so around all folders in it
            if name.startswith(("/", "../")):
                return None
        return None


def size_fault(size: int) -> tuple[str, str] | None:
    """Returns what is wrong with an image of this size, in bytes; None if nothing is."""
    try:
        check_size(size)
    except SampleError as error:
        return error.kind, str(error)
    return None


__all__ = ["ArchiveMembers", "Where", "size_fault"]

"""Reads images from one tar, to be made into shards: CLASS/*.jpg members, or a tar of tars. Doesn't decode them.

A member X.tar counts as a folder X, so the inner tars of the official ILSVRC2012_img_train.tar are its classes.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable

from ijepa_scale.data.shards.archive_members import ArchiveMembers, size_fault
from ijepa_scale.data.shards.archives import ArchiveImages
from ijepa_scale.data.sources.scan import Break, walk_members
from ijepa_scale.errors import DataError

_TAR = ".tar"
_NO_LINKS = "write regular files (tar --dereference --hard-dereference)"

_Span = tuple[int, int]  # offset and size in bytes


class TarImages(ArchiveImages):
    """The images of a tar; see `ArchiveImages`."""

    kind, wanted = "tar", "a complete, uncompressed one"

    def _list(self) -> ArchiveMembers:
        found = ArchiveMembers(self._path, _NO_LINKS)
        inner: dict[str, _Span] = {}
        try:
            with self._path.open("rb") as file:
                use = _collector(found, "", inner)
                self._check(walk_members(file, use, end=self._status.st_size), str(self._path))
                self._check_names(inner)
                for name, (offset, size) in inner.items():
                    use = _collector(found, f"{name[: -len(_TAR)]}/", None)
                    broken = walk_members(file, use, begin=offset, end=offset + size)
                    self._check(broken, f"{self._path}:{name}")
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise self._unreadable(error) from None
        return found

    def _bytes(self, descriptor: int, where: list[int]) -> bytes:
        offset, size = where
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise self._changed()
        return data

    def _check(self, broken: Break | None, name: str) -> None:
        if broken is not None:
            raise DataError(
                f"{name} is cut short or damaged after byte {broken.byte} ({broken.reason}); copy it again: "
                "a set made from it would be incomplete"
            )

    def _check_names(self, inner: dict[str, _Span]) -> None:
        """Refuses inner tars that would be one class: X.tar and X.TAR."""
        seen: dict[str, str] = {}
        for name in inner:
            other = seen.setdefault(name[: -len(_TAR)], name)
            if other != name:
                raise DataError(f"{self._path} holds {other} and {name}, which would be one class; rename one of them")


def _collector(
    found: ArchiveMembers, prefix: str, inner: dict[str, _Span] | None
) -> Callable[[tarfile.TarFile, tarfile.TarInfo], None]:
    """Returns a function that adds members, named `prefix` + NAME, and the spans of tars to `inner` if given."""
    found.add_folder(prefix.rstrip("/"))

    def use(_: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = found.usable(prefix, member.name)
        if name is None:
            return
        regular = member.isreg() and not member.issparse()
        if member.isdir():
            found.add_folder(name)
        elif member.issym():
            found.add_link(name, member.linkname)
        elif regular and inner is not None and name.lower().endswith(_TAR):
            found.add_folder(name.rpartition("/")[0])
            inner[name] = (member.offset_data, member.size)
        else:
            found.add_file(name, (member.offset_data, member.size) if regular else None, size_fault(member.size))

    return use


__all__ = ["TarImages"]

"""Reads images from one ZIP archive, to be made into shards. Doesn't decode them.

`zipfile` lists the archive. Members are read by offset, so that any number of processes read one file without listing
it again. Source of the local header's layout: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib

from ijepa_scale.data.shards.archive_members import ArchiveMembers, Where, size_fault
from ijepa_scale.data.shards.archives import ArchiveImages
from ijepa_scale.data.sources.scan import MAX_MEMBERS
from ijepa_scale.errors import DataError, SampleError

MAX_DIRECTORY_BYTES = 1 << 30  # of the list of members, which is read whole
_NO_LINKS = "write regular files (zip without --symlinks)"
_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, and the lengths of its name and its extra field
_SIGNATURE = b"PK\3\4"
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags
_UNIX = 3  # the system whose file modes an archive has
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MAX_LINK_BYTES = 4096
_GROWTH = 1024  # bytes: what can't be compressed grows by less, and by less than a hundredth


class ZipImages(ArchiveImages):
    """The images of a ZIP archive; see `ArchiveImages`.

    Encrypted members and members that share bytes, as in archives made to exhaust a machine, are refused. A member that
    is damaged, too large or compressed by a method other than deflate costs itself.
    """

    kind, wanted = "zip", "a complete one"

    def _list(self) -> ArchiveMembers:
        found = ArchiveMembers(self._path, _NO_LINKS)
        try:
            with _Directory(self._path) as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                self._check(members, archive.start_dir)
                for member in members:
                    self._add(found, member, file.fileno())
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, struct.error, NotImplementedError) as error:
            if isinstance(error, DataError):
                raise
            raise self._unreadable(error) from None
        return found

    def _check(self, members: list[zipfile.ZipInfo], end: int) -> None:
        """Refuses encrypted members, more than `MAX_MEMBERS`, and members that share bytes."""
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{self._path} has over {MAX_MEMBERS} members; write smaller archives")
        locked = next((member for member in members if member.flag_bits & _ENCRYPTED), None)
        if locked is not None:
            raise DataError(f"{self._path}:{locked.filename} is encrypted; write the archive without a password")
        ordered = sorted(members, key=lambda member: member.header_offset)
        for member, following in zip(ordered, [*(one.header_offset for one in ordered[1:]), end], strict=False):
            if not 0 <= member.header_offset <= following - _HEADER.size - member.compress_size:
                raise DataError(
                    f"{self._path}:{member.filename} shares bytes with other members, as in archives made to exhaust a "
                    "machine; write the archive again"
                )

    def _add(self, found: ArchiveMembers, member: zipfile.ZipInfo, descriptor: int) -> None:
        name = found.usable("", _name_of(member))
        if name is None:
            return
        where = (
            member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC
        )  # fmt: skip
        kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system == _UNIX else 0
        if member.is_dir():
            found.add_folder(name)
        elif kind == stat.S_IFLNK:
            found.add_link(name, self._target(descriptor, where))
        else:
            found.add_file(name, where if kind in (0, stat.S_IFREG) else None, _fault(where))

    def _target(self, descriptor: int, where: Where) -> str:
        """Returns where a link leads; a link that can't be read leads to nothing."""
        try:
            if where[2] <= _MAX_LINK_BYTES and _fault(where) is None:
                return os.fsdecode(_content(descriptor, where))
        except SampleError:
            pass
        return "/"

    def _bytes(self, descriptor: int, where: list[int]) -> bytes:
        return _content(descriptor, tuple(where))


class _Directory(io.FileIO):
    """A file that refuses to read more than a list of members may have."""

    def read(self, size: int | None = -1) -> bytes:
        """Returns up to `size` bytes, of which -1 means all; `zipfile` asks for all only at the end of the file."""
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a list of members of {size} bytes, at most {MAX_DIRECTORY_BYTES}")
        return super().read(MAX_DIRECTORY_BYTES if size is None or size < 0 else size) or b""


def _name_of(member: zipfile.ZipInfo) -> str:
    """Returns a member's name as the file system would have it: of bytes in an unknown encoding, those bytes."""
    name = member.filename
    return name if member.flag_bits & _UTF8 else os.fsdecode(name.encode("cp437"))  # as zipfile has decoded it


def _fault(where: Where) -> tuple[str, str] | None:
    """Returns the kind of what is wrong with a member, and the reason; None if nothing is."""
    _, packed, size, method, _ = where
    if method not in _METHODS:
        return "compression", f"compressed by method {method}; write it with deflate (8), or uncompressed (0)"
    if packed > size + size // 100 + _GROWTH:
        return "image size", f"{packed} bytes in the archive for {size} of the image; write it again"
    return size_fault(size)


def _content(descriptor: int, where: Where) -> bytes:
    """Returns the content of a member.

    Raises:
        SampleError: it is damaged.
        OSError: the archive can't be read.
    """
    offset, packed, size, method, checksum = where
    header = os.pread(descriptor, _HEADER.size, offset)
    if len(header) < _HEADER.size or not header.startswith(_SIGNATURE):
        raise SampleError("its header in the archive is damaged; write the archive again", "damaged member")
    _, name_bytes, extra_bytes = _HEADER.unpack(header)
    data = os.pread(descriptor, packed, offset + _HEADER.size + name_bytes + extra_bytes)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error:
            data = b""
    if len(data) != size or zlib.crc32(data) != checksum:
        raise SampleError(
            "it doesn't match its size or checksum in the archive; write the archive again", "damaged member"
        )
    return data


__all__ = ["MAX_DIRECTORY_BYTES", "ZipImages"]

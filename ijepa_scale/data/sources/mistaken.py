"""Says what a path leads to that isn't what a reader reads, and what to give instead. Knows no reader's format."""

from __future__ import annotations

import codecs
import os
import shlex
import stat
import tarfile
from pathlib import Path

from ijepa_scale.data.formats import is_data_image, is_image
from ijepa_scale.errors import DataError

TAR, TEXT, UNKNOWN = "a tar", "a text file", "a file of an unknown kind"
_EMPTY, _FOLDER, _IMAGE, _ZIP, _PARQUET = "an empty file", "a folder", "one image", "a zip archive", "a Parquet file"
_HEAD_BYTES = 512  # of a tar's header, which is the longest that is looked at
_BEGINNINGS = {
    b"PK\x03\x04": _ZIP, b"PK\x05\x06": _ZIP, b"\x1f\x8b": "a gzip file",
    b"\xfd7zXZ\x00": "an xz file", b"\x28\xb5\x2f\xfd": "a Zstandard file", b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a RAR archive", b"\xff\xd8\xff": _IMAGE, b"\x89PNG": _IMAGE,
    b"II*\x00": _IMAGE, b"MM\x00*": _IMAGE, b"\x89HDF": "an HDF5 file",
}  # fmt: skip
_WORDS = {b"PAR1": _PARQUET, b"BZh": "a bzip2 file", b"GIF8": _IMAGE, b"BM": _IMAGE}  # a path may begin so too
_PACKED = ("a gzip file", "a bzip2 file", "an xz file", "a Zstandard file", "a 7z archive", "a RAR archive")
_SPECIAL = {
    stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
}  # fmt: skip
_WANTED = {
    "shards": ("a tar of images", "a folder of *.tar, a glob, or a {000..127} pattern"),
    "imagefolder": ("a folder of images", "the folder with CLASS/*.jpg in it, its parent, or a folder of images"),
    "list": ("a list of images", "a text file with one path per line, or a .csv with path,label"),
}


def what_is(path: str | Path) -> str | None:
    """Returns what a path leads to, in words; None if there is nothing, or it can't be read. Never waits for a pipe."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return _FOLDER
        if not stat.S_ISREG(mode):
            return next((words for is_kind, words in _SPECIAL.items() if is_kind(mode)), UNKNOWN)
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return None
    return _kind_of(head) if head else _EMPTY


def _kind_of(head: bytes) -> str:
    """Returns what a file is by its first bytes."""
    if _is_text(head):
        return TEXT
    beginnings = {**_BEGINNINGS, **(_WORDS if b"\0" in head else {})}
    known = next((words for beginning, words in beginnings.items() if head.startswith(beginning)), None)
    if known is not None:
        return known
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypheic"):
        return _IMAGE
    if not any(head):
        return TAR  # one without members
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        return TAR
    except tarfile.TarError:
        return UNKNOWN


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return False


def mistaken(path: str | Path, reader: str) -> DataError | None:
    """Returns the error that a path leads to something that a reader doesn't read; None if it may read it.

    `reader` is shards, imagefolder or list. A path that leads to nothing is left to the reader, as is a text to lists.
    """
    kind = what_is(path)
    read = {"shards": (TAR,), "imagefolder": (_FOLDER,), "list": (TEXT, UNKNOWN, _EMPTY)}[reader]
    if kind is None or kind in read:
        return None
    wanted, give = _WANTED[reader]
    return DataError(f"{path} is {kind}, not {wanted}; {_remedy(path, kind, reader) or f'give {give}'}")


def _remedy(path: str | Path, kind: str, reader: str) -> str:
    """Returns what to do about a path that leads to this kind of thing; empty where there is nothing special."""
    if kind == _IMAGE or is_image(str(path)) or is_data_image(str(path)):
        return "give the folder that it is in, and set the reader to imagefolder"
    if kind in (_ZIP, _PARQUET):
        source = "zip" if kind == _ZIP else "parquet"
        quoted = shlex.quote(str(path))
        return f"write shards first: python launch/shards.py make --from {source} --root {quoted} --to SHARDS"
    if kind in _PACKED:
        return "unpack it, and give the folder, or a plain tar"
    if kind == TAR:
        return "set the reader to shards"
    if kind == _FOLDER:
        return "set the reader to imagefolder, or to shards for a folder of *.tar"
    if kind == TEXT:
        return f"set the reader to list if it names images, else give {_WANTED[reader][1]}"
    return ""

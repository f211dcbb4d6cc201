"""The index of a tar shard: the offset of each sample, found once and stored next to the tar.

A shard is an ordinary WebDataset tar: `KEY.jpg` with `KEY.cls` (a number or name) or `KEY.json` ({"label": ...}).
The index also counts, by kind, what can't be used. Knows nothing of decoding or batches.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import re
import secrets
import stat
import zipfile
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa_scale.data.formats import junk
from ijepa_scale.data.sources.index_arrays import read_arrays
from ijepa_scale.data.sources.labels import NO_LABEL, TEXT_LABEL
from ijepa_scale.data.sources.mistaken import mistaken
from ijepa_scale.data.sources.scan import MAX_MEMBER_BYTES, Members, Problems, scan_tar
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

INDEX_VERSION = 4
_ARRAYS = ("stamp", "offsets", "sizes", "labels", "key_bytes", "key_ends", "problems", "texts")
_SPARE_BYTES = 16 << 20
# the errors that reading a damaged index file can raise
_DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error
)  # fmt: skip
_REMOTE = re.compile(r"^(pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://|hf:)")
_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|lzma|br|z))$", re.IGNORECASE)
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")


class Names:
    """An immutable list of strings stored in two arrays, so that 14 million of them pickle quickly."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends  # (bytes,) uint8 and (N,) int64

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Returns the packed form of `names`."""
        blob, ends = bytearray(), array("q")
        for name in names:
            blob += name.encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        return cls(np.frombuffer(blob, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, item: int) -> str:
        begin = int(self.ends[item - 1]) if item else 0
        return self.blob[begin : int(self.ends[item])].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar, in the order of their images. Arrays are (N,) int64.

    A label of -1 means none; `TEXT_LABEL` - k is the class name texts[k].
    """

    path: Path
    tar_bytes: int
    tar_mtime_ns: int | None  # None for a fetched copy, whose time is meaningless
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: Names
    problems: Problems
    texts: tuple[str, ...] = ()  # sorted

    def __len__(self) -> int:
        return len(self.offsets)

    def label_text(self, row: int) -> str | None:
        """Returns the class name that is the label of a sample; None if its label is a number or missing."""
        label = int(self.labels[row])
        return self.texts[TEXT_LABEL - label] if label <= TEXT_LABEL else None


def index_path(tar: str | Path, members: Members | None = None) -> Path:
    """Returns the path of the index of `tar`, of its own for each choice of members."""
    return Path(index_address(str(tar), members))


def index_address(tar: str, members: Members | None = None) -> str:
    """Returns the path or address of the index of the tar at a path or address."""
    chosen = "" if members is None or members == Members() else f".{members.image or ''}+{members.label or ''}"
    return f"{tar}{chosen}.idx.npz"


def largest_index(tar_bytes: int) -> int:
    """Returns the most bytes that the index of a tar has, which holds less of each sample than the tar does."""
    return tar_bytes + _SPARE_BYTES


def index_tar(path: str | Path, members: Members | None = None) -> ShardIndex:
    """Returns the index of a tar shard: the stored one if size and mtime still match, else that of a new scan.

    A new index is written next to the tar under a temporary name and renamed, so any number of processes may
    do this at once. If the folder isn't writable, each process scans the tar itself.

    Raises:
        DataError: the file is missing, compressed or not a tar.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"shard {path} isn't a regular file; replace it, or drop it from the list")
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"shard {path} can't be read ({error.strerror}); check the path and its permissions") from None
    kept = index_path(path, members)
    index = load_index(kept, path, status.st_size, status.st_mtime_ns)
    if index is None:
        index = scan_index(path, status, members)
        save_index(index, kept)
    return index


def scan_index(path: Path, status: os.stat_result, members: Members | None = None) -> ShardIndex:
    """Scans the headers of a tar and returns its index.

    Raises:
        DataError: the file isn't a readable tar.
    """
    scan = scan_tar(path, members)
    offsets, sizes, labels = scan.columns
    return ShardIndex(
        path, status.st_size, status.st_mtime_ns, offsets, sizes, labels, Names.of(scan.keys), scan.problems,
        tuple(scan.texts),
    )  # fmt: skip


def expand(pattern: str | Path, suffix: str = ".tar") -> list[Path]:
    """Returns the sorted files that a folder, a glob or a brace pattern (`{000..127}`, `{a,b}`) names.

    Of a folder, takes the files with this suffix.

    Raises:
        DataError: nothing matches, a file that braces name is missing, the only file is no tar, or the pattern isn't a
            local path.
    """
    text = str(pattern)
    if _REMOTE.match(text):
        raise DataError(
            f"{text!r} isn't a local path; only data.train may be remote: copy the shards to a local folder and name it"
        )
    if os.path.isdir(text):
        return _tars_in(Path(text)) if suffix == ".tar" else _files_in(Path(text), suffix)
    alone = suffix == ".tar" and not is_tar(text) and os.path.lexists(text)
    if alone and (error := mistaken(text, "shards")) is not None:
        raise error
    paths: set[Path] = set()
    for name in braces(text):
        matches = [name] if os.path.isfile(name) else glob.glob(name)
        if not matches:
            raise DataError(f"{name!r} matches no file; name a folder of shards, a glob or a {{000..127}} pattern")
        paths.update(Path(match) for match in matches)
    return sorted(paths)


def is_tar(name: str) -> bool:
    """Returns whether a file is a shard by its name."""
    return name.lower().endswith(".tar")


def _tars_in(folder: Path) -> list[Path]:
    """Returns the sorted tars in a folder, and logs which others are in it or in the folders in it.

    Raises:
        DataError: there is none.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"folder {folder} can't be listed ({error.strerror}); fix its permissions or the disk"
        ) from None
    named = [entry for entry in entries if is_tar(entry.name)]
    found = [entry for entry in named if junk(entry.name) is None]
    notes = [f"{len(named) - len(found)} hidden *.tar files"] if len(found) < len(named) else []
    packed = [entry.name for entry in entries if _PACKED.search(entry.name) and junk(entry.name) is None]
    if packed:
        notes.append(f"{len(packed)} compressed archives, like {packed[0]}: unpack or write them as plain *.tar")
    inside = {entry: 0 if is_tar(entry.name) else _count_tars(entry) for entry in entries if junk(entry.name) is None}
    inside = {entry: count for entry, count in inside.items() if count}
    if inside:
        first = next(iter(inside))
        notes.append(f"{sum(inside.values())} *.tar files in {len(inside)} folders, like {first.name}: give {first}")
    if not found:
        seen = f", but {'; '.join(notes)}" if notes else ""
        raise DataError(
            f"folder {str(folder)!r} holds no *.tar file{seen}; name a folder of shards, a glob or a brace pattern, or "
            "set the reader to imagefolder for a folder of images"
        )
    for note in notes:
        logger.info("%s: not read: %s", folder, note)
    return found


def _files_in(folder: Path, suffix: str) -> list[Path]:
    """Returns the sorted files of another suffix in a folder, and logs how many hidden ones aren't read."""
    named = [entry for entry in folder.iterdir() if entry.suffix == suffix]
    found = [entry for entry in named if junk(entry.name) is None]
    if len(found) < len(named):
        logger.info("%s: %d hidden *%s files aren't read", folder, len(named) - len(found), suffix)
    if not found:
        raise DataError(
            f"folder {str(folder)!r} holds no *{suffix} file; name a folder of them, a glob or a brace pattern"
        )
    return sorted(found)


def _count_tars(folder: Path) -> int:
    """Returns the number of tars right in a folder; 0 if it is none or can't be listed."""
    try:
        return sum(is_tar(entry.name) and junk(entry.name) is None for entry in folder.iterdir())
    except OSError:
        return 0


def braces(text: str) -> list[str]:
    """Returns the names that `{a,b}` and `{000..127}` in `text` expand to."""
    begin = text.find("{")
    end = text.find("}", begin)
    if begin < 0 or end < 0:
        return [text]
    inner = text[begin + 1 : end]
    bounds = _RANGE.match(inner)
    if bounds:
        first, last = bounds.groups()
        if int(last) < int(first) or int(last) - int(first) > 1_000_000:
            raise DataError(f"{{{inner}}} in {text!r} isn't a range; give {{FIRST..LAST}} with FIRST <= LAST")
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = inner.split(",")
    return [text[:begin] + part + rest for part in parts for rest in braces(text[end + 1 :])]


def load_index(kept: Path, path: Path, tar_bytes: int, tar_mtime_ns: int | None) -> ShardIndex | None:
    """Returns the index in file `kept` if it belongs to this tar, else None; without an mtime only sizes are compared.

    A damaged index is logged and not used.
    """
    try:
        arrays = read_arrays(kept, _ARRAYS, most_bytes=largest_index(tar_bytes))
        version, stamped_bytes, mtime_ns = (int(number) for number in arrays["stamp"])
        if (version, stamped_bytes) != (INDEX_VERSION, tar_bytes) or tar_mtime_ns not in (None, mtime_ns):
            return None
        offsets, sizes, labels = (arrays[name].astype(np.int64) for name in ("offsets", "sizes", "labels"))
        keys = Names(arrays["key_bytes"].astype(np.uint8), arrays["key_ends"].astype(np.int64))
        problems = Problems.loads(arrays["problems"].tobytes())
        texts = tuple(str(text) for text in json.loads(arrays["texts"].tobytes()))
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        logger.warning("index %s is damaged (%s); scanning the tar again", kept, error)
        return None
    if (
        len({len(offsets), len(sizes), len(labels), len(keys)}) > 1
        or min(offsets.min(initial=0), sizes.min(initial=0)) < 0
        or labels.min(initial=0) <= TEXT_LABEL - len(texts)
    ):
        logger.warning("index %s is damaged (its columns disagree); scanning the tar again", kept)
        return None
    if ((labels < NO_LABEL) & (labels > TEXT_LABEL)).any():
        return None  # from a version that took negative labels
    if (offsets + sizes).max(initial=0) > tar_bytes or sizes.max(initial=0) > MAX_MEMBER_BYTES:
        logger.warning("index %s is damaged (it points outside the tar); scanning the tar again", kept)
        return None
    return ShardIndex(path, tar_bytes, tar_mtime_ns, offsets, sizes, labels, keys, problems, texts)


def save_index(index: ShardIndex, target: Path) -> None:
    """Writes the index atomically; if the folder isn't writable, only logs that."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # others may write the same index now
    try:
        if not target.parent.stat().st_mode & 0o222:  # read-only on purpose; root could write anyway
            raise PermissionError(errno.EACCES, "the folder is read-only")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            np.savez(
                file,
                stamp=np.array([INDEX_VERSION, index.tar_bytes, index.tar_mtime_ns or 0], dtype=np.int64),
                offsets=index.offsets,
                sizes=index.sizes.astype(np.int32),  # below MAX_MEMBER_BYTES
                labels=index.labels,
                key_bytes=index.keys.blob,
                key_ends=index.keys.ends,
                problems=np.frombuffer(index.problems.dumps(), dtype=np.uint8),
                texts=np.frombuffer(json.dumps(index.texts).encode(), dtype=np.uint8),
            )
        os.replace(temporary, target)
    except OSError as error:
        logger.warning("index %s can't be stored (%s); every process scans the tar itself", target, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink()


__all__ = [
    "Names", "ShardIndex", "braces", "expand", "index_address", "index_path", "index_tar", "is_tar", "largest_index",
    "load_index", "save_index", "scan_index",
]  # fmt: skip

"""Asks a disk, in a process of its own: a disk that hangs stops this process and no other. Imports nothing but Python.

Run as `python disk_probe.py REQUEST`, a JSON object with `do` and the arguments of that function; prints a JSON object.
"""

from __future__ import annotations

import base64
import glob
import itertools
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator

_CHUNK = 4 << 20  # bytes
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".npy", ".dcm")
_MOST_NAMES = 20_000  # looked at in a folder
_LARGEST_IMAGE = 32 << 20  # bytes


def write(folder: str, size: int, seconds: float) -> dict[str, object]:
    """Writes a file without a name, of `size` bytes or as much as fits in `seconds`, and reads it; leaves nothing.

    A folder that doesn't exist yet stands for the nearest one above that does.
    """
    near = _nearest(folder)
    chunk = os.urandom(_CHUNK)
    with tempfile.TemporaryFile(dir=near, buffering=0) as file:
        begin, written = time.perf_counter(), 0
        while written < size and time.perf_counter() - begin < seconds:
            file.write(chunk)
            written += len(chunk)
            os.fsync(file.fileno())
        write_s = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk
        file.seek(0)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds and file.read(_CHUNK):
            pass
        read_s, read = time.perf_counter() - begin, file.tell()
    state = os.statvfs(near)
    return {
        "folder": near,
        "filesystem": _filesystem(near),
        "free_bytes": state.f_frsize * state.f_bavail,
        "free_files": state.f_favail if state.f_files else None,
        "write_bytes_per_s": written / write_s,
        "read_bytes_per_s": read / read_s,
        "files_per_s": _small_files(near, min(seconds, 1.0)),
    }


def _nearest(folder: str) -> str:
    near = os.path.abspath(folder)
    while not os.path.isdir(near) and os.path.dirname(near) != near:
        near = os.path.dirname(near)
    return near


def _small_files(folder: str, seconds: float) -> float:
    """Returns how many files a second can be made and deleted one after another."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds and count < 200:
        descriptor, path = tempfile.mkstemp(prefix=".doctor-", dir=folder)
        os.close(descriptor)
        os.unlink(path)
        count += 1
    return count / (time.perf_counter() - begin)


def read(path: str, size: int, seconds: float, images: int) -> dict[str, object]:
    """Reads `size` bytes of data, or as much as it can in `seconds`, and returns the speed and the first images.

    `path` is a file, a folder, or a glob or {000..127} of tars, as in `data.train`.
    """
    begin, count, files = time.perf_counter(), 0, 0
    found: list[str] = []
    spent = 0.0
    for name in _files(path):
        if len(found) < images:
            found += _first_images(name, images - len(found))
        with open(name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while data := file.read(_CHUNK):
                count += len(data)
                if count >= size or time.perf_counter() - begin > seconds:
                    break
            spent += time.perf_counter() - started
        files += 1
        if (count >= size and len(found) >= images) or time.perf_counter() - begin > seconds:
            break
    return {
        "filesystem": _filesystem(os.path.dirname(os.path.abspath(path))),
        "files": files,
        "bytes": count,
        "read_bytes_per_s": count / spent if spent else None,
        "images": found,
    }


def _files(path: str) -> Iterator[str]:
    """Yields files of the data, at most `_MOST_NAMES`, without sorting."""
    if path.endswith(".txt") and os.path.isfile(path):
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for line in itertools.islice(lines, _MOST_NAMES):
                name = os.path.join(os.path.dirname(path), line.rstrip("\n").split(",")[0])
                if os.path.isfile(name):
                    yield name
        return
    first = re.sub(r"\{(\d+)\.\.\d+\}", r"\1", path)
    looked = 0
    for top in [first] if os.path.exists(first) else glob.iglob(first):
        if os.path.isfile(top):
            yield top
        for folder, _, names in os.walk(top):
            for name in names:
                looked += 1
                if looked > _MOST_NAMES:
                    return
                if name.lower().endswith((*_IMAGES, ".tar")):
                    yield os.path.join(folder, name)


def _first_images(path: str, count: int) -> list[str]:
    """Returns up to `count` images of a file, in base64: those of a tar, or the file itself."""
    found: list[bytes] = []
    if path.endswith(".tar"):
        with tarfile.open(path, "r:") as members:
            for member in members:
                small = member.isreg() and member.size <= _LARGEST_IMAGE
                if len(found) < count and small and member.name.lower().endswith(_IMAGES):
                    found.append(members.extractfile(member).read())  # type: ignore[union-attr]
                if len(found) >= count:
                    break
    elif path.lower().endswith(_IMAGES) and os.path.getsize(path) <= _LARGEST_IMAGE:
        with open(path, "rb") as file:
            found.append(file.read())
    return [base64.b64encode(data).decode() for data in found]


def leave(folder: str, name: str) -> dict[str, object]:
    """Makes an empty file, for other hosts to see, in a folder or the nearest one above that exists; returns which."""
    near = _nearest(folder)
    os.close(os.open(os.path.join(near, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return {"folder": near}


def look(folder: str, name: str, seconds: float) -> dict[str, object]:
    """Returns whether the file is there, and waits for it: a network's folder may show it late."""
    begin = time.perf_counter()
    while not (seen := os.path.exists(os.path.join(folder, name))) and time.perf_counter() - begin < seconds:
        time.sleep(0.1)
    return {"seen": seen}


def remove(folder: str, name: str) -> dict[str, object]:
    """Removes the file that `leave` made, if it did."""
    try:
        os.unlink(os.path.join(folder, name))
    except FileNotFoundError:
        pass
    return {}


def _filesystem(folder: str) -> str:
    """Returns the kind of file system that holds a folder, such as ext4 or nfs4."""
    found, longest = "unknown", -1
    folder = os.path.realpath(folder)
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, point, kind, *_ = line.split()
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
            inside = folder == point or folder.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= longest:
                found, longest = kind, len(point)
    return found


_DOES: dict[str, Callable[..., dict[str, object]]] = {
    "write": write,
    "read": read,
    "leave": leave,
    "look": look,
    "remove": remove,
}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    try:
        print(json.dumps(_DOES[arguments.pop("do")](**arguments)))
    except OSError as problem:
        sys.exit(f"{problem.filename or arguments.get('folder') or arguments.get('path')}: {problem.strerror}")

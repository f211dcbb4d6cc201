"""Reads the arrays of an index file, which may be forged: never more bytes than the file has, and no objects."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np

from ijepa_scale.regular_file import check_regular

_MAX_HEADER = 4096  # bytes, of an array


def read_arrays(path: Path, names: tuple[str, ...], *, most_bytes: int) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz` file that `numpy.savez` has written, which holds these names and no others.

    Raises:
        ValueError: the file is larger, or an array is compressed, has objects, or isn't as long as its header says.
        OSError, zipfile.BadZipFile, LookupError: it can't be read, or is no such file.
    """
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"{size} bytes, over {most_bytes}")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sorted(member.filename for member in members) != sorted(f"{name}.npy" for name in names):
                raise ValueError("it holds other arrays")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("an array is compressed")
            if sum(member.file_size for member in members) > size:
                raise ValueError("its arrays are larger than the file")
            return {name: _array(archive.read(f"{name}.npy")) for name in names}


def _array(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array is of another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_HEADER)
    if dtype.hasobject or dtype.kind not in "iu" or len(shape) != 1:
        raise ValueError(f"an array is {shape} of {dtype}")
    if len(data) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array isn't as long as it says")
    return np.frombuffer(data, dtype, offset=stream.tell())


__all__ = ["read_arrays"]

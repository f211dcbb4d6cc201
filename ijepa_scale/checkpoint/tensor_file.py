"""Writes safetensors files tensor by tensor, hashing what it writes, so that nothing is copied or read back.

The format is a length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format). Files
are read by the library `safetensors`, which writes only what is in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

_BYTES = 4  # of an element
_BLOCK = 1 << 22  # bytes written and hashed at once; both release the interpreter's lock


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[int, str]:
    """Writes flat fp32 tensors of any device under distinct names, and returns the file's bytes and SHA-256.

    One tensor at a time is copied to the host. Waits until the file is on the disk.

    Raises:
        OSError: it can't be written.
    """
    assert all(tensor.dtype is torch.float32 and tensor.ndim == 1 for _, tensor in tensors)
    sizes = [(name, tensor.numel()) for name, tensor in tensors]
    return write_values(path, sizes, (bytes_of(tensor) for _, tensor in tensors))


def write_values(path: Path, sizes: Sequence[tuple[str, int]], values: Iterable[memoryview]) -> tuple[int, str]:
    """Writes flat fp32 tensors of these names and numbers of elements, whose bytes come in order, in any portions.

    Returns the file's bytes and SHA-256. Waits until the file is on the disk.

    Raises:
        OSError: it can't be written.
    """
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for data in chain([memoryview(_header(sizes))], values):
            for start in range(0, len(data), _BLOCK):
                part = data[start : start + _BLOCK]
                digest.update(part)
                while part:  # a call may write less, as the last one before a disk is full does
                    part = part[file.write(part) :]
            written += len(data)
        os.fsync(file.fileno())
    return written, digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, which is copied to the host if it isn't there."""
    return tensor.detach().cpu().contiguous().numpy().data.cast("B")


def _header(sizes: Sequence[tuple[str, int]]) -> bytes:
    entries, offset = {}, 0
    for name, size in sizes:
        assert name not in entries, name
        end = offset + _BYTES * size
        entries[name] = {"dtype": "F32", "shape": [size], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text

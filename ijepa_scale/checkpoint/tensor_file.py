"""Writes safetensors files tensor by tensor, hashing what it writes, so that nothing is copied or read back.

The format is a length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format). Files
are read by the library `safetensors`, which writes only what is in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

_BLOCK = 1 << 22  # bytes written and hashed at once; both release the interpreter's lock


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[int, str]:
    """Writes flat fp32 tensors of any device under distinct names, and returns the file's bytes and SHA-256.

    One tensor at a time is copied to the host. Waits until the file is on the disk.

    Raises:
        OSError: it can't be written.
    """
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        blocks = chain([memoryview(_header(tensors))], (_bytes_of(tensor) for _, tensor in tensors))
        for data in blocks:
            for start in range(0, len(data), _BLOCK):
                part = data[start : start + _BLOCK]
                digest.update(part)
                while part:  # a call may write less, as the last one before a disk is full does
                    part = part[file.write(part) :]
            written += len(data)
        os.fsync(file.fileno())
    return written, digest.hexdigest()


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors:
        assert tensor.dtype is torch.float32 and tensor.ndim == 1 and name not in entries, name
        entries[name] = {
            "dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, offset + tensor.nbytes],
        }  # fmt: skip
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().numpy().data.cast("B")

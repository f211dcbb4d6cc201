"""Writes a checkpoint again as few files, elsewhere: what many processes wrote, in one folder to keep or pass on.

Any engine reads any checkpoint, so this changes no value. Streams, so memory doesn't grow with the checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.checkpoint import folder as steps
from ijepa_scale.checkpoint.manifest import MANIFEST, damage_of, read_manifest, write_manifest
from ijepa_scale.checkpoint.store import Checkpoint
from ijepa_scale.checkpoint.tensor_file import bytes_of, write_values
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.new_file import named

_BYTES = 4  # of an element: all tensors are fp32
_BLOCK = 1 << 20  # elements in memory at once

Range = tuple[str, int, int]  # tensor, first element, number of elements


def consolidate(source: Path, to: Path, *, files: int = 1) -> Path:
    """Writes the checkpoint at `source`, or the newest of a run, as `files` files into the new folder `to`.

    The folder has its name once all is written and read back. Both stay whole if it fails.

    Raises:
        CheckpointError: the source is damaged or incomplete, or the disk doesn't take the new one.
        ConfigError: `to` exists, or the source is no checkpoint.
    """
    path = source if (source / MANIFEST).exists() else steps.newest(source / "checkpoints")
    if path is None:
        raise ConfigError(f"{source} isn't a checkpoint and has none; give a run, or RUN/checkpoints/step-00001000")
    if os.path.lexists(to):
        raise ConfigError(f"{to} exists; name a new folder with --to")
    checkpoint = Checkpoint(path)
    for stored in checkpoint.files:
        if (problem := damage_of(path / stored.name, stored)) is not None:
            raise CheckpointError(f"{problem}; convert an older checkpoint")
    unfinished = to.with_name(f".unfinished-{to.name}")
    try:
        with named(to):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
            unfinished.mkdir(parents=True)
            _write(checkpoint.trusted(), unfinished, files)
            steps.put(unfinished, to)
    except OSError as error:
        raise CheckpointError(f"{to} can't be written ({error}); free space, or name another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return to


def _write(checkpoint: Checkpoint, folder: Path, files: int) -> None:
    sizes = {name: math.prod(tensor.shape) for name, tensor in sorted(checkpoint.tensors.items())}
    needed, free = _BYTES * sum(sizes.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it needs {needed} bytes, and {free} are free")
    entries = [
        _write_file(checkpoint, folder / f"process-{number:05d}.safetensors", ranges)
        for number, ranges in enumerate(_shares(sizes, files))
    ]
    write_manifest(folder, checkpoint.step, entries, checkpoint.extra)
    for stored in read_manifest(folder).files:
        if (problem := damage_of(folder / stored.name, stored)) is not None:
            raise OSError(f"it doesn't read back as written: {problem}")


def _shares(sizes: dict[str, int], files: int) -> list[list[Range]]:
    """Returns the ranges of each file, which all hold as many elements, but for one."""
    total, begin = sum(sizes.values()), 0
    cuts = [total * number // files for number in range(files + 1)]
    shares: list[list[Range]] = [[] for _ in range(files)]
    for name, size in sizes.items():
        for number, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
            first, last = max(low, begin), min(high, begin + size)
            if first < last:
                shares[number].append((name, first - begin, last - first))
        begin += size
    return [share for share in shares if share]


def _write_file(checkpoint: Checkpoint, path: Path, ranges: list[Range]) -> dict[str, Any]:
    """Writes a safetensors file, hashing it, and returns its facts for the manifest."""
    sizes = [(name, length) for name, _, length in ranges]
    count, digest = write_values(path, sizes, _values(checkpoint, ranges))
    shapes = {name: list(checkpoint.tensors[name].shape) for name, _, _ in ranges}
    return {
        "name": path.name,
        "bytes": count,
        "sha256": digest,
        "pieces": [[name, start, length, shapes[name]] for name, start, length in ranges],
    }


def _values(checkpoint: Checkpoint, ranges: list[Range]) -> Iterator[memoryview]:
    """Yields the bytes of the ranges, some MB at a time."""
    for name, start, length in ranges:
        shape = tuple(checkpoint.tensors[name].shape)
        for at in range(start, start + length, _BLOCK):
            block = torch.empty(min(_BLOCK, start + length - at))
            checkpoint.load([Piece(name=name, tensor=block, start=at, shape=shape)])
            yield bytes_of(block)


__all__ = ["consolidate"]

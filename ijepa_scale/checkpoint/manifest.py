"""The manifest of a checkpoint: which elements of which tensor are in which file. Written last, read first.

A manifest may come from anybody, so what it says is held against the files' sizes before memory is reserved for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ijepa_scale.checkpoint.digests import digest_of_files
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import CheckpointError
from ijepa_scale.new_file import flush
from ijepa_scale.regular_file import read_regular

FORMAT = 1
MANIFEST = "manifest.json"
_GIVE = "give a folder like RUN/checkpoints/step-00001000"
_BYTES = 4  # of an element: all tensors are fp32
_Count = Annotated[int, Field(ge=0)]


class Damage(CheckpointError):
    """A checkpoint whose files aren't what was written."""


class StoredFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    bytes: _Count
    sha256: str


class StoredTensor(BaseModel):
    """Where the elements of a full tensor are: (number of the file, first element, number of elements)."""

    model_config = ConfigDict(frozen=True, strict=True)

    shape: Annotated[list[_Count], Field(max_length=8)]
    pieces: list[Annotated[list[_Count], Field(min_length=3, max_length=3)]]


class Manifest(BaseModel):
    """The content of a manifest. `extra` is what the run stored beside its tensors."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: int
    step: _Count
    files: list[StoredFile]
    tensors: dict[str, StoredTensor]
    extra: dict[str, Any]


def write_manifest(folder: Path, step: int, entries: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """Writes the manifest of files that processes have written. Each entry has a file's facts and its `pieces`."""
    tensors: dict[str, Any] = {}
    for index, entry in enumerate(entries):
        for name, start, length, shape in entry["pieces"]:
            tensors.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append([index, start, length])
    files = [{key: entry[key] for key in ("name", "bytes", "sha256")} for entry in entries]
    _write(folder, {"format": FORMAT, "step": step, "files": files, "tensors": tensors, "extra": extra})


def amend(folder: Path, extra: dict[str, Any]) -> None:
    """Replaces what a checkpoint stores beside its tensors. The old or the new manifest is there at every moment."""
    _write(folder, read_manifest(folder).model_dump() | {"extra": extra})


def _write(folder: Path, body: dict[str, Any]) -> None:
    body = _readable(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    path = folder / MANIFEST
    new = path.with_name(f".new-{MANIFEST}")
    new.write_text(json.dumps({"sha256": digest, "body": body}, sort_keys=True))
    flush(new)
    os.replace(new, path)
    flush(folder)


def _readable(value: Any) -> Any:
    """Returns null for numbers that JSON hasn't got, such as the gradient norm of a step that was left out."""
    if isinstance(value, dict):
        return {key: _readable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a checkpoint.

    Raises:
        Damage: it is damaged, or is another program's.
        CheckpointError: there is none, another version wrote it, or it contradicts itself or its files.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}; {_GIVE}")
    try:
        manifest = parse_json(read_regular(file))
        if isinstance(manifest, dict) and not manifest.keys() & {"body", "sha256"}:
            raise Damage(f"{folder} isn't a checkpoint: its {MANIFEST} is of something else; {_GIVE}")
        body = manifest["body"]
        intact = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() == manifest["sha256"]
        found = body["format"] if intact else None
    except Damage:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damage(f"{file} is damaged; remove {folder} to resume from an older checkpoint")
    if found != FORMAT:
        raise CheckpointError(f"{folder} has format {found!r}, but this version reads {FORMAT}; use a matching version")
    try:
        read = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: {where} is wrong ({first['msg']}); do not trust it") from None
    _check(file, read)
    return read


def _check(path: Path, manifest: Manifest) -> None:
    """Refuses a manifest that contradicts itself, so that no reader reserves memory that no file can fill."""
    for stored in manifest.files:
        if Path(stored.name).name != stored.name or stored.name in ("", ".", ".."):
            raise CheckpointError(f"{path} names a file outside its folder: {stored.name!r}; do not trust it")
    held = [0] * len(manifest.files)
    for name, tensor in manifest.tensors.items():
        size = math.prod(tensor.shape)
        for index, start, length in tensor.pieces:
            if index >= len(held) or start + length > size:
                raise CheckpointError(
                    f"{path}: {name} has elements {start} to {start + length} in file {index}, but {size} elements "
                    f"and {len(held)} files; do not trust it"
                )
            held[index] += _BYTES * length
        ordered = sorted((start, start + length) for _, start, length in tensor.pieces if length)
        for (_, end), (start, _) in zip(ordered, ordered[1:], strict=False):
            if start < end:
                raise CheckpointError(f"{path}: {name} has element {start} twice; do not trust it")
    for stored, size in zip(manifest.files, held, strict=True):
        if size > stored.bytes:
            raise CheckpointError(
                f"{path}: {stored.name} has {stored.bytes} bytes but is said to hold tensors of {size}; do not trust it"
            )


def damage_of(path: Path, stored: StoredFile, *, hashed: bool = True) -> str | None:
    """Returns what is wrong with a file of a checkpoint, or None. Its bytes are read only if `hashed`.

    Raises:
        OSError: it is there but can't be read.
    """
    size = os.stat(path).st_size if path.is_file() else None
    if size == stored.bytes and (not hashed or digest_of_files([path]) == stored.sha256):
        return None
    there = "missing" if size is None else f"{size} bytes"
    return f"{path} is damaged: {there}, expected {stored.bytes} bytes with sha256 {stored.sha256[:12]}..."

"""Checkpoints on disk: atomic, hashed, readable by any engine on any number of processes.

A checkpoint is a folder `step-00001000` with one safetensors file per writing process and a `manifest.json`. The
manifest says which elements of which tensor are stored in which file, so a reader asks for the elements it needs,
whatever the number of processes. Nothing in it is executable.

It is written under a temporary name and renamed when complete, so a folder with its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa_scale.checkpoint.digests import digest_of_files
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished-"


def save(folder: Path, step: int, pieces: Iterable[Piece], *, world: World, extra: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-XXXXXXXX` from all processes' pieces and returns its path.

    Communicates, so every process must call it. `folder` must be on a file system that all processes share. Removes
    all but the `keep` newest checkpoints.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f"{_UNFINISHED}{final.name}"
    if world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.barrier()
    written = [piece for piece in pieces if piece.write and piece.tensor.numel()]
    entry: dict[str, Any] = {}
    if written:
        name = f"process-{world.rank:05d}.safetensors"
        write_safetensors({piece.name: piece.tensor.cpu().contiguous() for piece in written}, unfinished / name)
        _flush(unfinished / name)
        entry = {
            "name": name,
            "bytes": (unfinished / name).stat().st_size,
            "sha256": digest_of_files([unfinished / name]),
            "pieces": [[p.name, p.start, p.tensor.numel(), list(p.shape)] for p in written],
        }
    entries = world.gather_objects(entry)
    if world.is_main:
        body = _manifest(step, [e for e in entries if e], extra)  # type: ignore[misc]
        text = json.dumps(body, sort_keys=True)
        manifest = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, sort_keys=True))
        _flush(unfinished / MANIFEST)
        _flush(unfinished)
        if final.exists():  # the same step was saved before
            _remove(final)
        os.replace(unfinished, final)
        _flush(folder)
        _prune(folder, keep, final)
    world.barrier()
    return final


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors to a file.

    Raises:
        CheckpointError: the file can't be written.
    """
    try:
        save_file(tensors, str(path), metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be written ({error}); what was saved before is whole: free space or fix the permissions"
        ) from None


def _manifest(step: int, entries: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for index, entry in enumerate(entries):
        for name, start, length, shape in entry["pieces"]:
            tensors.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append([index, start, length])
    files = [{key: entry[key] for key in ("name", "bytes", "sha256")} for entry in entries]
    return {"format": FORMAT, "step": step, "files": files, "tensors": tensors, "extra": extra}


def newest(folder: Path) -> Path | None:
    """Returns the complete checkpoint of the highest step in `folder`, or None if there is none."""
    complete = sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())
    return complete[-1] if complete else None


class Checkpoint:
    """A checkpoint opened for reading. Each file is checked against its hash when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        body = _read_manifest(path)
        self.step: int = body["step"]
        self.extra: dict[str, Any] = body["extra"]
        self._files: list[dict[str, Any]] = body["files"]
        self.tensors: dict[str, Any] = body["tensors"]
        self._open: dict[int, Any] = {}

    def load(self, pieces: Iterable[Piece]) -> None:
        """Fills the pieces' tensors, from a checkpoint of any engine and number of processes.

        Raises:
            CheckpointError: tensors are missing or have another shape, or a file is damaged.
        """
        wanted = list(pieces)
        self._check_names(wanted)
        for piece in wanted:
            filled = 0
            for index, start, length in self.tensors[piece.name]["pieces"]:
                low, high = max(start, piece.start), min(start + length, piece.start + piece.tensor.numel())
                if low < high:
                    part = self._file(index).get_slice(piece.name)[low - start : high - start]
                    piece.tensor[low - piece.start : high - piece.start].copy_(part)
                    filled += high - low
            if filled != piece.tensor.numel():
                raise CheckpointError(
                    f"{self.path}: {piece.name} has only {filled} of the {piece.tensor.numel()} elements from "
                    f"{piece.start} on; the manifest lacks the file of a process: use an older checkpoint"
                )

    def full(self, prefix: str) -> dict[str, Tensor]:
        """Returns the full fp32 tensors whose names begin with `prefix`, by name without the prefix."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        shapes = {name: tuple(self.tensors[name]["shape"]) for name in names}
        flat = {name: torch.empty(torch.Size(shapes[name]).numel()) for name in names}
        for name in names:
            for index, start, length in self.tensors[name]["pieces"]:
                flat[name][start : start + length] = self._file(index).get_tensor(name)
        return {name.removeprefix(prefix): flat[name].view(shapes[name]) for name in names}

    def _check_names(self, wanted: list[Piece]) -> None:
        problems = []
        for piece in wanted:
            stored = self.tensors.get(piece.name)
            if stored is None:
                problems.append(f"{piece.name} is missing")
            elif tuple(stored["shape"]) != piece.shape:
                problems.append(f"{piece.name} has shape {tuple(stored['shape'])}, the model {piece.shape}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.path} doesn't match this model: {'; '.join(problems[:5])}{more}; "
                "use the configuration it was trained with, or another folder"
            )

    def _file(self, index: int) -> Any:
        if index not in self._open:
            entry = self._files[index]
            path = self.path / entry["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"] or digest_of_files([path]) != entry["sha256"]:
                raise CheckpointError(
                    f"{path} is damaged: {size} bytes, expected {entry['bytes']} with sha256 "
                    f"{entry['sha256'][:12]}...; remove {self.path} to resume from an older checkpoint"
                )
            self._open[index] = safe_open(str(path), framework="pt")
        return self._open[index]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}; give a folder like RUN/checkpoints/step-00001000")
    try:
        manifest = parse_json(file.read_bytes())
        body = manifest["body"]
        intact = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() == manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{file} is damaged; remove {path} to resume from an older checkpoint")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {body['format']}, but this version reads {FORMAT}; use a matching version"
        )
    for entry in body["files"]:
        if Path(entry["name"]).name != entry["name"]:
            raise CheckpointError(f"{file} names a file outside its folder: {entry['name']!r}; do not trust it")
    return body


def _remove(path: Path) -> None:
    """Renames a checkpoint and then removes it, so that a kill leaves no incomplete one under its name."""
    hidden = path.with_name(f"{_UNFINISHED}removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _prune(folder: Path, keep: int, written: Path) -> None:
    """Removes all but the `keep` newest checkpoints, and keeps `written` even if others have later steps."""
    for path in sorted(p for p in folder.glob("step-*") if (p / MANIFEST).is_file())[:-keep]:
        if path != written:
            _remove(path)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

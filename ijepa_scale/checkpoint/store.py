"""Checkpoints on disk: atomic, hashed, readable by any engine on any number of processes.

A checkpoint is a folder `step-00001000` with one safetensors file per writing process and a `manifest.json`. The
manifest says which elements of which tensor are stored in which file, so a reader asks for the elements it needs,
whatever the number of processes. Nothing in it is executable.

It is written under a temporary name and renamed when complete, so a folder with its final name is complete.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa_scale.checkpoint import folder as steps
from ijepa_scale.checkpoint.folder import newest, put
from ijepa_scale.checkpoint.manifest import (
    MANIFEST,
    Damage,
    StoredFile,
    StoredTensor,
    amend,
    damage_of,
    read_manifest,
)
from ijepa_scale.checkpoint.torch_files import briefly
from ijepa_scale.checkpoint.writing import save
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.escapes import one_line

logger = logging.getLogger(__name__)

__all__ = [
    "MANIFEST", "Checkpoint", "Damage", "amend", "newest", "newest_readable", "newest_whole", "put", "save", "whole",
    "write_safetensors",
]  # fmt: skip


def newest_whole(folder: Path, world: World) -> Checkpoint | None:
    """Returns the newest checkpoint whose files are all as written, or None if there never was one.

    Sets aside what is damaged. Processes share the reading, and all return the same. Communicates. Only for the run
    that holds the folder.

    Raises:
        CheckpointError: none is whole, but there was one; or the newest can't be read.
        ConfigError: processes don't see the same files.
    """
    if world.is_main:
        steps.recover(folder)
    while True:
        names = steps.named(folder) if world.is_main else []
        path = cast("Path | None", world.broadcast_object(names[-1] if names else None))
        if path is None:
            aside = cast(list[Path], world.broadcast_object(steps.damaged(folder) if world.is_main else None))
            if aside:
                raise CheckpointError(
                    f"{folder} has no intact checkpoint, only {aside[-1].name}; set resume=none to begin again "
                    "from step 0, or resume=PATH to go on from another run's checkpoint"
                )
            return None
        try:
            return whole(path, world)
        except Damage as error:
            problem = world.broadcast_object(_set_aside(path, error) if world.is_main else None)
            if problem is not None:
                raise CheckpointError(str(problem)) from None


def _set_aside(path: Path, why: Damage) -> str | None:
    """Sets a checkpoint aside and says so, or returns the reason why it can't be."""
    try:
        logger.warning("%s is set aside as %s: %s", path, steps.set_aside(path).name, why)
    except OSError as error:
        return f"{path} is damaged and can't be renamed ({error}); remove it to resume from an older checkpoint"
    return None


def newest_readable(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose manifest can be read, or None. Its tensors may be damaged."""
    for path in reversed(steps.named(folder)):
        with contextlib.suppress(CheckpointError):
            return Checkpoint(path).path
    return None


def whole(path: Path, world: World) -> Checkpoint:
    """Returns the checkpoint, every file of which was read and is as written. Communicates.

    Raises:
        Damage: a file is missing or isn't what was written; raised on every process.
        CheckpointError: it is none, or can't be read.
        ConfigError: processes don't see the same files.
    """
    problem: Exception | None = None
    if world.is_main:
        problem = _outside(path)
    problem = cast("Exception | None", world.broadcast_object(problem))
    if problem is not None:
        raise problem
    mine: str | None = None
    try:
        checkpoint = Checkpoint(path)
        for stored in checkpoint.files[world.rank :: world.size]:
            mine = mine or damage_of(path / stored.name, stored)
    except (OSError, CheckpointError) as error:
        mine = str(error)
    found = cast(list["str | None"], world.gather_objects(mine))
    for rank, text in enumerate(found):
        if text is not None:
            confirmed = world.broadcast_object(_is_damaged(path, rank, world.size) if world.is_main else None)
            if confirmed:
                raise Damage(f"{text}; remove {path} to resume from an older checkpoint")
            raise ConfigError(
                f"process {rank} can't read {path} as process 0 does ({text}); put `folder` on a file system that all "
                "processes share"
            )
    return checkpoint.trusted()


def _outside(path: Path) -> Exception | None:
    """Returns what the main process finds wrong with a checkpoint without reading its tensors."""
    try:
        if not path.is_dir() or not (path / MANIFEST).is_file():
            return Damage(f"{path} has no {MANIFEST}")
        for stored in Checkpoint(path).files:
            text = damage_of(path / stored.name, stored, hashed=False)
            if text is not None:
                return Damage(f"{text}; remove {path} to resume from an older checkpoint")
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError(f"{path} can't be read ({error}); fix the disk or the permissions, and start again")
    return None


def _is_damaged(path: Path, rank: int, size: int) -> bool:
    """Returns whether this process too finds damage in the files that another process has read."""
    try:
        return any(damage_of(path / stored.name, stored) for stored in Checkpoint(path).files[rank::size])
    except OSError:
        return False  # it can't be read, which isn't damage: nothing is set aside, and `whole` says so
    except CheckpointError:
        return True  # the manifest was whole a moment ago


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors to a file.

    Raises:
        CheckpointError: the file can't be written.
    """
    try:
        save_file(tensors, str(path), metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be written ({error}); earlier checkpoints are intact: free space or fix the permissions"
        ) from None


class Checkpoint:
    """A checkpoint opened for reading. Each file is checked against its hash when it is first read.

    Raises:
        CheckpointError: it has no manifest, or one that is damaged or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_manifest(path)
        self.step: int = manifest.step
        self.extra: dict[str, Any] = manifest.extra
        self.files: list[StoredFile] = manifest.files
        self.tensors: dict[str, StoredTensor] = manifest.tensors
        self._open: dict[int, Any] = {}
        self._is_checked = False

    def trusted(self) -> Checkpoint:
        """Returns this checkpoint, whose files were checked just now and aren't checked again."""
        self._is_checked = True
        return self

    def load(self, pieces: Iterable[Piece]) -> None:
        """Fills the pieces' tensors, from a checkpoint of any engine and number of processes.

        Raises:
            CheckpointError: tensors are missing or have another shape, or a file is damaged or isn't what the manifest
            says.
        """
        wanted = list(pieces)
        self._check_names(wanted)
        for piece in wanted:
            filled = 0
            for index, start, length in self.tensors[piece.name].pieces:
                low, high = max(start, piece.start), min(start + length, piece.start + piece.tensor.numel())
                if low < high:
                    part = self._part(index, piece.name, low - start, high - start)
                    piece.tensor[low - piece.start : high - piece.start].copy_(part)
                    filled += high - low
            if filled != piece.tensor.numel():
                raise CheckpointError(
                    f"{self.path}: {one_line(piece.name)} has only {filled} of the {piece.tensor.numel()} elements "
                    f"from {piece.start} on; the manifest lacks the file of a process: use an older checkpoint"
                )

    def full(self, prefix: str) -> dict[str, Tensor]:
        """Returns the full fp32 tensors whose names begin with `prefix`, by name without the prefix.

        Raises:
            CheckpointError: elements are missing, or a file is damaged.
        """
        names = [name for name in self.tensors if name.startswith(prefix)]
        pieces = {}
        for name in names:
            shape = tuple(self.tensors[name].shape)
            stored = sum(length for _, _, length in self.tensors[name].pieces)
            if stored < torch.Size(shape).numel():  # before memory is reserved
                raise CheckpointError(
                    f"{self.path}: {one_line(name)} has only {stored} of its {torch.Size(shape).numel()} elements"
                )
            pieces[name] = Piece(name=name, tensor=torch.empty(torch.Size(shape).numel()), start=0, shape=shape)
        self.load(pieces.values())
        return {name.removeprefix(prefix): piece.tensor.view(piece.shape) for name, piece in pieces.items()}

    def _check_names(self, wanted: list[Piece]) -> None:
        problems = []
        for piece in wanted:
            stored = self.tensors.get(piece.name)
            if stored is None:
                problems.append(f"{one_line(piece.name)} is missing")
            elif tuple(stored.shape) != piece.shape:
                problems.append(f"{one_line(piece.name)} has shape {tuple(stored.shape)}, the model {piece.shape}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.path} doesn't match this model: {'; '.join(problems[:5])}{more}; "
                "use the configuration it was trained with, or another folder"
            )

    def _part(self, index: int, name: str, begin: int, end: int) -> Tensor:
        """Returns elements of a tensor that a file holds, counted from the first that it holds."""
        path = self.path / self.files[index].name
        try:
            part: Tensor = self._file(index).get_slice(name)[begin:end]
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{path} can't be read ({error.strerror or error}); put it back, or fix the disk"
            ) from None
        except (SafetensorError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{path}: {one_line(name)} can't be read ({one_line(briefly(error))}); do not trust it"
            ) from None
        if tuple(part.shape) != (end - begin,) or part.dtype != torch.float32:
            raise CheckpointError(
                f"{path}: {one_line(name)} is {tuple(part.shape)} of {str(part.dtype).removeprefix('torch.')}, but "
                f"{MANIFEST} says {end - begin} elements of float32; do not trust it"
            )
        return part

    def _file(self, index: int) -> Any:
        if index not in self._open:
            stored = self.files[index]
            path = self.path / stored.name
            text = None if self._is_checked else damage_of(path, stored)
            if text is not None:
                raise Damage(f"{text}; remove {self.path} to resume from an older checkpoint")
            self._open[index] = safe_open(str(path), framework="pt")
        return self._open[index]

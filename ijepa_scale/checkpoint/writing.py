"""Writes checkpoints: each process its share of the state, into a folder that gets its name when it is complete."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ijepa_scale.checkpoint import folder as steps
from ijepa_scale.checkpoint.manifest import write_manifest
from ijepa_scale.checkpoint.tensor_file import write_tensors
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import SaveError

logger = logging.getLogger(__name__)


def parts_to_write(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns the elements that this process writes: those that it alone holds, and its share of the others.

    Tensors that the same processes hold are laid end to end and cut into one equal share for each process, so nearly
    all of them stay whole.
    """
    kept = [piece for piece in pieces if piece.tensor.numel()]
    total: Counter[tuple[int, int]] = Counter()
    for piece in kept:
        total[piece.share] += piece.tensor.numel()
    parts, before = [], Counter[tuple[int, int]]()
    for piece in kept:
        (index, count), size, passed = piece.share, piece.tensor.numel(), before[piece.share]
        low, high = (total[piece.share] * number // count - passed for number in (index, index + 1))
        low, high = max(low, 0), min(high, size)
        before[piece.share] += size
        if low < high:
            parts.append(replace(piece, tensor=piece.tensor[low:high], start=piece.start + low))
    return parts


def save(
    folder: Path,
    step: int,
    pieces: Iterable[Piece],
    *,
    world: World,
    extra: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Writes `folder/step-XXXXXXXX` from all processes' pieces and returns its path.

    Communicates, so every process must call it. `folder` must be on a file system that all processes share. Removes
    all but the `keep` newest checkpoints and those of multiples of `keep_every`, if that isn't 0.

    Raises:
        SaveError: it can't be written; raised on every process. Older checkpoints are whole, and what was written of
            this one is removed.
    """
    parts = parts_to_write(pieces)
    return write_parts(folder, step, parts, world=world, extra=extra, keep=keep, keep_every=keep_every)


def write_parts(
    folder: Path,
    step: int,
    parts: list[Piece],
    *,
    world: World,
    extra: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Does what `save` does, with what `parts_to_write` returned or a copy of it."""
    final, unfinished = steps.path_of(folder, step), steps.unfinished_path_of(folder, step)
    needed = sum(cast(list[int], world.gather_objects(sum(part.tensor.nbytes for part in parts))))
    _agree(world, lambda: _begin(folder, unfinished, needed), final, needed)
    entry: dict[str, Any] | None = None
    problem = None
    try:
        entry = _write(unfinished / f"process-{world.rank:05d}.safetensors", parts) if parts else None
    except OSError as error:
        problem = _text_of(error)
    found = cast(list[tuple[Any, str | None]], world.gather_objects((entry, problem)))
    _agree(world, lambda: _end(final, unfinished, step, found, extra), final, needed)
    if world.is_main:
        try:
            steps.prune(folder, keep, final, keep_every=keep_every)
        except OSError as error:
            logger.warning("older checkpoints of %s can't be removed: %s", folder, error)
    return final


def _begin(folder: Path, unfinished: Path, needed: int) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed - free} bytes too few are free")


def _write(path: Path, parts: list[Piece]) -> dict[str, Any]:
    """Writes this process's file and returns its facts for the manifest."""
    size, digest = write_tensors(path, [(part.name, part.tensor) for part in parts])
    return {
        "name": path.name,
        "bytes": size,
        "sha256": digest,
        "pieces": [[part.name, part.start, part.tensor.numel(), list(part.shape)] for part in parts],
    }


def _end(final: Path, unfinished: Path, step: int, found: list[tuple[Any, str | None]], extra: dict[str, Any]) -> None:
    """Completes the checkpoint that all processes have written, or removes what there is of it."""
    problems = [f"process {rank}: {problem}" for rank, (_, problem) in enumerate(found) if problem is not None]
    try:
        if problems:
            raise OSError("; ".join(problems))
        write_manifest(unfinished, step, [entry for entry, _ in found if entry is not None], extra)
        steps.put(unfinished, final)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _agree(world: World, act: Callable[[], None], final: Path, needed: int) -> None:
    """Lets the main process act, and raises its error on every process. Communicates."""
    problem = None
    if world.is_main:
        try:
            act()
        except OSError as error:
            problem = _text_of(error)
            with contextlib.suppress(OSError):
                problem += f"; {shutil.disk_usage(final.parent).free} bytes are free in {final.parent}"
    problem = world.broadcast_object(problem)  # type: ignore[assignment]
    if problem is not None:
        raise SaveError(
            f"{final} can't be written ({problem}; it needs {needed} bytes); earlier checkpoints are intact: free "
            "space or fix the permissions"
        )


def _text_of(error: OSError) -> str:
    return error.strerror or str(error)

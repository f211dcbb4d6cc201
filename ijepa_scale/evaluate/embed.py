"""Computes the features of any number of images into one file: distributed, each image once, and resumable.

Images are cut into chunks. Each chunk's features are a file in a folder next to the result, complete when it has its
final name. The chunks don't depend on the number of processes, and neither does the result. The result gets its name
last, when it is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ijepa_scale import terminal
from ijepa_scale.checkpoint.sources import open_source
from ijepa_scale.data.class_names import written
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.feature_files import check_format, write_features
from ijepa_scale.evaluate.frozen import ImageTransform, Pool, check_pool, load, pooled
from ijepa_scale.evaluate.image_sets import ImageSet
from ijepa_scale.train import processes

logger = logging.getLogger(__name__)

CHUNK = 512  # images of one part; a killed process loses no more
_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What to embed, with what, and where to."""

    images: Sequence[str]
    model: str
    to: Path
    which: str = "target"
    pool: Pool = "mean"
    image_size: int | None = None
    reader: str | None = None
    batch_size: int = 64
    workers: int = 2
    overwrite: bool = False
    progress: bool = True


class Embedded(NamedTuple):
    """The result: what was written, and the names of the images that were skipped with their reasons."""

    path: Path
    rows: int
    width: int
    skipped: list[str]


class Part(NamedTuple):
    """The features of one chunk: (n, D) float32, their images' numbers (n,) int64, and the skipped ones' reasons."""

    features: Tensor
    ids: np.ndarray
    skipped: dict[int, str]


def embed_here(options: EmbedOptions, launch: Launch, device: torch.device) -> None:
    """Embeds in this process, and reports if it is the main process."""
    terminal.log_to_terminal(logging.INFO if launch.rank == 0 else logging.WARNING)
    with processes.world_of(launch, device, alone=True) as world:
        result = embed(options, world)
    if launch.rank == 0:
        for line in result.skipped:
            terminal.report(line, "skipped")
        terminal.say(f"{result.path}: {result.rows} x {result.width}, {len(result.skipped)} images skipped")
        sys.exit(terminal.USER_ERROR_CODE if result.skipped else 0)  # another process would end this one meanwhile


def embed(options: EmbedOptions, world: World) -> Embedded:
    """Writes the features of all images, and returns what came of it on every process. Every process must call it.

    The rows are in the order of the images. Images that can't be used have no row. Continues what an earlier call with
    the same arguments began.

    Raises:
        UserError: images or model can't be read, the file exists, or a folder holds parts of something else.
    """
    check_format(options.to)
    encoder, transform = load(options.model, which=options.which, image_size=options.image_size)
    check_pool(encoder, options.pool)
    images = ImageSet.of(options.images, options.reader)
    folder = options.to.with_name(f"{options.to.name}.parts")
    problem = _prepare(options, images, transform, folder) if world.is_main else None
    problem = world.broadcast_object(problem)  # type: ignore[assignment]
    if problem is not None:
        raise ConfigError(problem)
    chunks = range(0, len(images), CHUNK)
    left = [begin for begin in chunks if not _part(folder, begin).exists()]
    world.barrier()  # all have listed what is left before any adds a part
    encoder.to(world.device)
    mine = left[world.rank :: world.size]
    batches = _Batches(images, transform)
    starts = [list(range(b, min(b + options.batch_size, c + CHUNK, len(images)))) for c in mine
              for b in range(c, min(c + CHUNK, len(images)), options.batch_size)]  # fmt: skip
    loaded = iter(ordered_loader(batches, starts, workers=options.workers, prefetch=2))
    with tqdm(
        total=sum(map(len, starts)),
        unit="image",
        desc=f"process 0 of {world.size}" if world.size > 1 else None,
        disable=not (world.is_main and options.progress),
    ) as bar:
        for begin in mine:
            count = -(-(min(begin + CHUNK, len(images)) - begin) // options.batch_size)
            parts: list[tuple[Tensor | None, list[int], dict[int, str]]] = []
            for _ in range(count):
                pixels, ids, skipped = next(loaded)
                features = pooled(encoder, pixels.to(world.device), options.pool).cpu() if ids else None
                parts.append((features, ids, skipped))
                bar.update(len(ids) + len(skipped))
            _write_part(_part(folder, begin), parts)
    world.barrier()
    result = _finish(options, images, folder, chunks) if world.is_main else None
    found = world.broadcast_object(result)
    world.barrier()  # the last collective
    assert isinstance(found, Embedded)
    return found


def _prepare(options: EmbedOptions, images: ImageSet, transform: ImageTransform, folder: Path) -> str | None:
    """Makes the folder of parts, and returns what speaks against it, if anything."""
    plan = {
        "images": images.fingerprint,
        "count": len(images),
        "model": open_source(options.model).digest(),
        "which": options.which,
        "pool": options.pool,
        "transform": repr(transform),
        "batch": options.batch_size,
        "chunk": CHUNK,
    }
    file = folder / _PLAN
    try:
        known = json.loads(file.read_text()) if file.is_file() else None
        if known is not None and known != plan:
            changed = ", ".join(name for name in plan if known.get(name) != plan[name])
            return f"{folder} holds parts of other features ({changed} differs); remove it, or name another file"
        if options.to.exists() and known is None:
            if not options.overwrite:
                return f"{options.to} exists; name another file, or add --overwrite"
            options.to.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".unfinished")
        temporary.write_text(json.dumps(plan, indent=2))
        os.replace(temporary, file)
    except (OSError, ValueError) as error:
        return f"{folder} can't be used ({error}); free space, fix its permissions, or name another file"
    return None


def _part(folder: Path, begin: int) -> Path:
    return folder / f"part-{begin:010d}.safetensors"


def _write_part(path: Path, parts: list[tuple[Tensor | None, list[int], dict[int, str]]]) -> None:
    """Writes a chunk's features under a temporary name, and renames the whole file."""
    whole = [found for found, _, _ in parts if found is not None]
    ids = torch.tensor([each for _, ids, _ in parts for each in ids], dtype=torch.int64)
    skipped = {str(number): reason for _, _, reasons in parts for number, reason in reasons.items()}
    temporary = path.with_name(f".unfinished-{path.name}")
    features = torch.cat(whole) if whole else torch.empty(0, 0)
    save_file({"features": features, "ids": ids}, temporary, metadata={"skipped": json.dumps(skipped)})
    os.replace(temporary, path)


def _read_part(path: Path) -> Part:
    with safe_open(str(path), framework="pt") as file:
        skipped = json.loads(file.metadata()["skipped"])
        ids = file.get_tensor("ids").numpy()
        return Part(file.get_tensor("features"), ids, {int(number): reason for number, reason in skipped.items()})


def _finish(options: EmbedOptions, images: ImageSet, folder: Path, chunks: range) -> Embedded:
    """Writes the result from all parts, and removes them."""
    parts = [_part(folder, begin) for begin in chunks]
    rows, width, skipped = 0, 0, [written(line) for line in images.problems]
    for path in parts:
        part = _read_part(path)
        rows, width = rows + len(part.ids), max(width, part.features.shape[1])
        skipped += [written(f"{images.name(number)}: {reason}") for number, reason in sorted(part.skipped.items())]
    if rows == 0:
        shutil.rmtree(folder)
        raise DataError(f"none of {len(images)} images can be used; the first: {skipped[0]}")
    if not options.to.exists():

        def read() -> Iterator[tuple[np.ndarray, list[str]]]:
            for path in parts:
                part = _read_part(path)
                if len(part.ids):
                    yield part.features.numpy(), [written(images.name(number)) for number in part.ids.tolist()]

        facts: dict[str, Any] = {"model": options.model, "which": options.which, "pool": options.pool}
        write_features(options.to, (rows, width), read, facts)
    shutil.rmtree(folder)
    return Embedded(options.to, rows, width, skipped)


class _Batches(Dataset):
    """Maps the numbers of images to their pixels, the numbers of those that can be used, and the reasons of others."""

    def __init__(self, images: ImageSet, transform: ImageTransform) -> None:
        self._images, self._transform = images, transform

    def __getitem__(self, numbers: list[int]) -> tuple[Tensor, list[int], dict[int, str]]:
        pixels, ids, skipped = [], [], {}
        for number in numbers:
            try:
                pixels.append(self._transform.pixels(self._images.read(number)))
                ids.append(number)
            except DataError as error:
                skipped[number] = str(error)
        return self._transform(pixels), ids, skipped

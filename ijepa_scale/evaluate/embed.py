"""Computes the features of any number of images into one file: distributed, each image once, and resumable.

Parts are kept in a folder next to the result, which gets its name last, when it is whole. It doesn't depend on the
number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ijepa_scale import terminal
from ijepa_scale.checkpoint.sources import open_source
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.class_names import written
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.alike import check_opened, check_options
from ijepa_scale.evaluate.bar import Bar
from ijepa_scale.evaluate.feature_files import check_format, write_features
from ijepa_scale.evaluate.frozen import ImageTransform, Pool, check_pool, load, pooled
from ijepa_scale.evaluate.image_sets import ImageSet
from ijepa_scale.evaluate.parts import Loaded, Parts, Skipped
from ijepa_scale.new_file import check_replaceable
from ijepa_scale.plurals import counted
from ijepa_scale.regular_file import read_regular
from ijepa_scale.train import processes

logger = logging.getLogger(__name__)

_PLAN, _FEATURES = "plan.json", "features"


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
    """The result: what was written, and why images were skipped: a line for each, or for each shard."""

    path: Path
    rows: int
    width: int
    skipped: list[str]
    num_skipped: int


def embed_here(options: EmbedOptions, launch: Launch, device: torch.device) -> None:
    """Embeds in this process, and reports if it is the main process."""
    terminal.log_to_terminal(logging.INFO if launch.rank == 0 else logging.WARNING)
    with processes.world_of(launch, device, alone=True) as world:
        result = embed(options, world)
    if launch.rank == 0:
        for line in result.skipped:
            terminal.report(line, "skipped")
        terminal.say(f"{result.path}: {result.rows} x {result.width}, {counted(result.num_skipped, 'image')} skipped")
        sys.exit(terminal.USER_ERROR_CODE if result.skipped else 0)  # another process would end this one meanwhile


def embed(options: EmbedOptions, world: World) -> Embedded:
    """Writes the features of all images, and returns what came of it on every process. Every process must call it.

    The rows are in the order of the images. Images that can't be used have no row. Continues what an earlier call with
    the same arguments began.

    Raises:
        UserError: images or model can't be read, the file exists, or a folder holds parts of something else.
    """
    check_format(options.to)
    check_options(world, options, paths={"images", "model", "to"}, flags={})
    encoder, transform = load(options.model, which=options.which, image_size=options.image_size)
    check_pool(encoder, options.pool)
    images = ImageSet.of(options.images, options.reader)
    check_opened(world, encoder, {"the images": images.described if world.size > 1 else ""})
    parts = Parts(
        options.to.with_name(f"{options.to.name}.parts"), len(images), batch_size=options.batch_size
    )  # fmt: skip
    problem = _prepare(options, images, transform, parts) if world.is_main else None
    problem = world.broadcast_object(problem)  # type: ignore[assignment]
    if problem is not None:
        raise ConfigError(problem)
    encoder.to(world.device)
    name = f"process 0 of {world.size}" if world.size > 1 else "features"
    bar = Bar(name, "image", shown=world.is_main and options.progress)
    parts.compute(
        _Batches(images, transform),
        lambda pixels: {_FEATURES: pooled(encoder, pixels, options.pool)},
        world=world, workers=options.workers, advance=bar.show,
    )  # fmt: skip
    result = _finish(options, images, parts) if world.is_main else None
    found = world.broadcast_object(result)
    world.barrier()  # the last collective
    assert isinstance(found, Embedded)
    return found


def _prepare(options: EmbedOptions, images: ImageSet, transform: ImageTransform, parts: Parts) -> str | None:
    """Makes the folder of parts, and returns what speaks against it, if anything."""
    plan = {
        "images": images.fingerprint,
        "count": len(images),
        "model": open_source(options.model).digest(),
        "which": options.which,
        "pool": options.pool,
        "transform": repr(transform),
        "batch": options.batch_size,
        "chunk": parts.chunk,
    }
    folder, file = parts.folder, parts.folder / _PLAN
    try:
        known = parse_json(read_regular(file)) if file.is_file() else None
        if known is not None and known != plan:
            old = known if isinstance(known, dict) else {}
            changed = ", ".join(name for name in plan if old.get(name) != plan[name])
            return f"{folder} holds parts of other features ({changed} differs); remove it, or name another file"
        check_replaceable(options.to)
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


def _finish(options: EmbedOptions, images: ImageSet, parts: Parts) -> Embedded:
    """Writes the result from all parts, and removes them."""
    rows, width, lost = 0, 0, Counter[str]()
    skipped, num_skipped = [written(line) for line in images.problems], images.num_lost
    for part in parts.read():
        rows += len(part.ids)
        width = part.values[_FEATURES].shape[1] if part.values else width
        num_skipped += len(part.skipped)
        lost.update(each.reason for each in part.skipped.values() if each.shard is not None)
        skipped += [
            written(f"{images.name(number)}: {each.reason}")
            for number, each in sorted(part.skipped.items())
            if each.shard is None
        ]
    skipped += [written(f"{counted(count, 'image')}: {reason}") for reason, count in lost.items()]
    if rows == 0:
        parts.remove()
        raise DataError(f"none of {len(images)} images can be used; the first: {skipped[0]}")
    if not options.to.exists():

        def read() -> Iterator[tuple[np.ndarray, list[str]]]:
            for part in parts.read():
                if part.values:
                    yield part.values[_FEATURES].numpy(), [written(images.name(each)) for each in part.ids.tolist()]

        facts: dict[str, Any] = {"model": options.model, "which": options.which, "pool": options.pool}
        write_features(options.to, (rows, width), read, facts)
    parts.remove()
    return Embedded(options.to, rows, width, skipped, num_skipped)


class _Batches(Dataset[Loaded]):
    """Maps the numbers of images to a batch."""

    def __init__(self, images: ImageSet, transform: ImageTransform) -> None:
        self._images, self._transform = images, transform

    def __getitem__(self, numbers: list[int]) -> Loaded:
        pixels, ids, skipped = [], [], {}
        for number in numbers:
            try:
                pixels.append(self._transform.pixels(self._images.read(number)))
                ids.append(number)
            except DataError as error:
                skipped[number] = Skipped(str(error), getattr(error, "shard", None))
        return Loaded(self._transform(pixels), ids, skipped)

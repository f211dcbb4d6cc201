"""Computes something of each of many images in parts, which are files: distributed, each image once, and resumable.

Images are cut into chunks of some batches. What is computed of a chunk is a file, complete when it has its final name.
The chunks don't depend on the number of processes, and neither does what is in them. Knows nothing of encoders.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.engine.world import World
from ijepa_scale.new_file import new_file

logger = logging.getLogger(__name__)

BATCHES = 8  # of one part; a killed process loses no more

Compute = Callable[[Tensor], dict[str, Tensor]]  # pixels (n, C, h, w) on the device -> values (n, ...) by name


class Skipped(NamedTuple):
    """Why an image can't be used, and the shard that can't, if that is the reason."""

    reason: str
    shard: str | None = None


class Loaded(NamedTuple):
    """A batch of images."""

    pixels: Tensor  # (n, C, h, w)
    ids: list[int]  # n numbers
    skipped: dict[int, Skipped]  # by the numbers of images that can't be used


class Part(NamedTuple):
    """What was computed of a chunk."""

    values: dict[str, Tensor]  # (n, ...) by name; none if no image can be used
    ids: np.ndarray  # (n,) int64, numbers of the images
    skipped: dict[int, Skipped]  # by the numbers of images that can't be used


class Parts:
    """The parts of `count` images, in a folder that all processes see."""

    def __init__(self, folder: Path, count: int, *, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.chunk = BATCHES * batch_size  # images
        self.count = count

    def compute(
        self,
        batches: Dataset[Loaded],
        compute: Compute,
        *,
        world: World,
        workers: int,
        advance: Callable[[int, int], None],
    ) -> None:
        """Computes the parts that aren't there yet, each on one process. Every process must call it.

        `batches` maps lists of numbers to their images. `advance(done, total)` is called with the images of this
        process.
        """
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        world.barrier()
        left = [begin for begin in range(0, self.count, self.chunk) if not self._is_whole(self._path(begin))]
        world.barrier()  # all have listed what is left before any adds a part
        mine = [self._batches_of(begin) for begin in left[world.rank :: world.size]]
        numbers = [batch for batches in mine for batch in batches]
        loaded = iter(ordered_loader(batches, numbers, workers=workers, prefetch=2))
        done, total = 0, sum(map(len, numbers))
        advance(done, total)
        for chunk in mine:
            found: list[tuple[dict[str, Tensor], Loaded]] = []
            for numbers_of_batch in chunk:
                batch = next(loaded)
                values = compute(batch.pixels.to(world.device)) if batch.ids else {}
                found.append(({name: value.cpu() for name, value in values.items()}, batch))
                done += len(numbers_of_batch)
                advance(done, total)
            self._write(self._path(chunk[0][0]), found)
        world.barrier()

    def read(self) -> Iterator[Part]:
        """Yields all parts in the order of the images."""
        for begin in range(0, self.count, self.chunk):
            with safe_open(str(self._path(begin)), framework="pt") as file:
                skipped = _skipped_in(file)
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            yield Part(values, values.pop("ids").numpy(), skipped)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    def _batches_of(self, begin: int) -> list[list[int]]:
        end = min(begin + self.chunk, self.count)
        return [list(range(at, min(at + self.batch_size, end))) for at in range(begin, end, self.batch_size)]

    def _is_whole(self, path: Path) -> bool:
        """Returns whether a part is there; says so if there is a file that has been cut."""
        try:
            with safe_open(str(path), framework="pt") as file:
                _skipped_in(file)
                if file.get_slice("ids").get_dtype() == "I64":
                    return True
        except FileNotFoundError:
            return False
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError):
            pass
        logger.warning("%s is damaged; it is recomputed", path)
        return False

    def _path(self, begin: int) -> Path:
        return self.folder / f"part-{begin:010d}.safetensors"

    def _write(self, path: Path, found: list[tuple[dict[str, Tensor], Loaded]]) -> None:
        """Writes a chunk under a temporary name, and renames the whole file."""
        names = {name for values, _ in found for name in values}
        joined = {name: torch.cat([values[name] for values, _ in found if values]) for name in names}
        ids = torch.tensor([number for _, batch in found for number in batch.ids], dtype=torch.int64)
        skipped = {str(number): reason for _, batch in found for number, reason in batch.skipped.items()}
        with new_file(path) as temporary:
            save_file({**joined, "ids": ids}, temporary, metadata={"skipped": json.dumps(skipped)})


def _skipped_in(file: Any) -> dict[int, Skipped]:
    """Returns the numbers of a part's images that can't be used, and why."""
    found = parse_json(file.metadata()["skipped"].encode())
    return {int(number): Skipped(str(reason), shard and str(shard)) for number, (reason, shard) in found.items()}

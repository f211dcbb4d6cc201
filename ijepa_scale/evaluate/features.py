"""Computes one feature per image from an encoder's patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ijepa_scale import stopping
from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.eval_reader import EvalBatch, bad_images
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.stopping import Stopped

_NAMED = 5  # bad images in an error
_BATCHES_UNASKED = 4  # between looks whether a process was asked to stop

Forward = Callable[[Tensor], Tensor]  # images (B, C, h, w) -> tokens (B, N, D)
Gather = Callable[[Tensor], Tensor]  # (...) -> (processes, ...); all processes pass equal shapes


def local_ids(ids: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Returns this process's consecutive part of `ids`, padded with the last id to the same length on every process.

    Sharded encoders communicate in forward, so all processes must run it equally often.
    """
    per_process = -(-len(ids) // world)
    padded = np.concatenate([ids, np.repeat(ids[-1:], per_process * world - len(ids))])
    return padded[rank * per_process : (rank + 1) * per_process]


def check_images(
    source: SampleSource,
    ids: np.ndarray,
    name: str,
    *,
    world: World,
    exif: Exif = "ignore",
    pixels: PixelFormat = RGB8,
    workers: int = 0,
) -> None:
    """Decodes the images of an evaluation set once, so that a bad one is found before anything is trained.

    `name` is the setting that names the set. Communicates: every process tries its part, and all raise the same error.

    Raises:
        DataError: images can't be read or decoded; a result over the others couldn't be compared with any other.
    """
    part = local_ids(ids, world.rank, world.size)
    found = world.gather_objects(bad_images(source, part, exif=exif, pixels=pixels, workers=workers))
    bad = list(dict.fromkeys(text for texts in found for text in cast(list[str], texts)))  # the last id is padding
    if bad:
        shown = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        raise DataError(
            f"{name}: {len(bad)} of {len(ids)} images can't be used, and a result over the others couldn't be "
            f"compared; replace or drop them: {shown}"
        )


def until_asked(batches: Iterable[EvalBatch], world: World) -> Iterator[EvalBatch]:
    """Yields the batches, of which every process has equally many, unless a process is asked to stop. Communicates.

    Raises:
        Stopped: one was; raised on every process.
    """
    for number, batch in enumerate(batches):
        if number % _BATCHES_UNASKED == 0 and world.any(stopping.reason() is not None):
            raise Stopped("in an evaluation")
        yield batch


def extract_features(forward: Forward, batches: Iterable[EvalBatch], device: torch.device) -> Tensor:
    """Returns the mean patch token of each image, (N, D) float32 on `device`, in the order of `batches`."""
    with torch.no_grad():
        parts = [forward(batch.images.to(device, non_blocking=True)).float().mean(dim=1) for batch in batches]
    return torch.cat(parts)


def gather_features(features: Tensor, gather: Gather, total: int) -> Tensor:
    """Returns the features of all `total` images, in the order of their ids, on every process. Communicates."""
    return gather(features).flatten(0, 1)[:total]

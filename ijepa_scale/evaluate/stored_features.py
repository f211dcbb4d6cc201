"""Features of a whole image set, computed once by all processes and kept in a file. Knows nothing of classifiers.

A file's name holds a hash of the weights, the images and how they are read, so that it is never taken for another's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.checkpoint.digests import digest_of_tensors
from ijepa_scale.config.form import Exif
from ijepa_scale.data.eval_reader import EvalReader
from ijepa_scale.data.sources.contents import contents_of
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.features import check_images, local_ids
from ijepa_scale.evaluate.frozen import ImageTransform, Pool, check_pool, pooled
from ijepa_scale.models.layers import Block, LayerNorm
from ijepa_scale.models.vit import VisionTransformer

_BATCHES_AT_ONCE = 8  # of each process, after which rows are written


@dataclass(frozen=True, kw_only=True)
class ImagesToEncode:
    """Images to compute features of."""

    name: str  # for messages and the file's name
    source: SampleSource
    exif: Exif = "ignore"


class FeatureStore:
    """A folder of features. All processes of the run call it, and share its file system."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        batch_size: int = 64,
        workers: int = 0,
        advance: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`advance(name, done, total)` is called on process 0 as images are done."""
        self.folder, self.world = folder, world
        self._batch_size, self._workers = batch_size, workers
        self._advance = advance or (lambda name, done, total: None)

    def features(
        self,
        encoder: VisionTransformer,
        transform: ImageTransform,
        images: ImagesToEncode,
        pool: Pool,
        *,
        tried: bool = False,
    ) -> np.ndarray:
        """Returns the features of all images in the order of the source, memory-mapped.

        They are (N, W) float32. All `tokens` are (N, P, D) float16: half of the disk, and a relative error of 0.0005.

        An earlier run's are taken if they are of these weights and images; one that was interrupted is continued. The
        encoder is on this process's device. Unless the images were `tried` before, all are decoded first.

        Raises:
            DataError: images can't be read or decoded.
            ConfigError: the encoder doesn't have `pool`.
        """
        check_pool(encoder, pool)
        path = self.folder / f"{images.name}-{self._key(encoder, transform, images, pool)}.npy"
        total = images.source.num_samples
        if not self.world.broadcast_object(path.exists()):
            if not tried:
                check_images(
                    images.source, np.arange(total), images.name, world=self.world, exif=images.exif,
                    pixels=transform.format, workers=self._workers,
                )  # fmt: skip
            self._compute(encoder, transform, images, pool, path)
        self._advance(images.name, total, total)
        return np.load(path, mmap_mode="r")

    def _compute(
        self, encoder: VisionTransformer, transform: ImageTransform, images: ImagesToEncode, pool: Pool, path: Path
    ) -> None:
        """Writes the file: rows into a temporary one, which is renamed when it is whole."""
        world, total = self.world, images.source.num_samples
        patches, width = encoder.pos_embed.shape[1:]
        rest = (patches, width) if pool == "tokens" else (width * (4 if pool == "last4" else 1),)
        kind = np.dtype(np.float16 if pool == "tokens" else np.float32)
        unfinished = path.with_suffix(".unfinished")
        written = path.with_suffix(".rows")  # the number of rows that are on the disk
        done = int(world.broadcast_object(self._begin(unfinished, written, (total, *rest), kind)))  # type: ignore[call-overload]
        rows = np.load(unfinished, mmap_mode="r+") if world.is_main else None
        at_once = self._batch_size * _BATCHES_AT_ONCE * world.size
        for begin in range(done, total, at_once):
            self._advance(images.name, begin, total)
            ids = np.arange(begin, min(total, begin + at_once))
            reader = EvalReader(
                images.source,
                transform.image_size,
                ids=local_ids(ids, world.rank, world.size),
                batch_size=self._batch_size,
                crop_fraction=transform.crop_fraction,
                mean=transform.mean,
                std=transform.std,
                exif=images.exif,
                pixels=transform.format,
                workers=self._workers,
                pin_memory=world.device.type == "cuda",
            )
            parts = [pooled(encoder, batch.images.to(world.device), pool) for batch in reader]
            found = world.gather(torch.cat(parts)).flatten(0, 1)[: len(ids)]
            if pool == "tokens":
                _check_float16(found, images.name)
            if rows is not None:
                rows[begin : begin + len(ids)] = found.cpu().numpy()
                rows.flush()
                _write_atomically(written, str(begin + len(ids)))
        if rows is not None:
            del rows
            os.replace(unfinished, path)
            written.unlink(missing_ok=True)
        world.barrier()

    def _begin(self, unfinished: Path, written: Path, shape: tuple[int, ...], kind: np.dtype) -> int:
        """Makes the temporary file on process 0, unless an interrupted run left it; returns the rows that are done."""
        if not self.world.is_main:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if unfinished.exists() and written.exists():
            return int(written.read_text())
        np.lib.format.open_memmap(unfinished, mode="w+", dtype=kind, shape=shape).flush()
        _write_atomically(written, "0")
        return 0

    def _key(self, encoder: VisionTransformer, transform: ImageTransform, images: ImagesToEncode, pool: Pool) -> str:
        """Returns 16 hexadecimal digits that change with anything that features depend on."""
        facts = {
            "weights": digest_of_tensors({name: each.cpu() for name, each in encoder.state_dict().items()}),
            "eps": sorted({layer.eps for layer in encoder.modules() if isinstance(layer, LayerNorm)}),
            "heads": sorted({block.attn.heads for block in encoder.modules() if isinstance(block, Block)}),
            "images": contents_of(images.source),
            "count": images.source.num_samples,
            "transform": repr(transform),
            "exif": images.exif,
            "pool": pool,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


def _check_float16(tokens: Tensor, name: str) -> None:
    highest = tokens.abs().max().item()  # host sync
    if not highest <= torch.finfo(torch.float16).max:
        raise DataError(f"{name}: tokens have values up to {highest:g}, which float16 can't hold; check the weights")

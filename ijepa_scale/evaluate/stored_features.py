"""Features of a whole image set, computed once by all processes and kept in files. Knows nothing of classifiers.

A file's name holds a hash of the weights, the images and how they are read, so that it is never taken for another's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ijepa_scale.checkpoint.digests import digest_of_tensors
from ijepa_scale.config.form import Exif
from ijepa_scale.data.eval_reader import EvalImages
from ijepa_scale.data.sources.contents import contents_of
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.array_file import opened, write_array
from ijepa_scale.evaluate.features import check_images
from ijepa_scale.evaluate.frozen import ImageTransform, Pool, check_pool
from ijepa_scale.evaluate.parts import Loaded, Parts, Skipped
from ijepa_scale.models.layers import Block, LayerNorm
from ijepa_scale.models.vit import VisionTransformer

logger = logging.getLogger(__name__)

Advance = Callable[[str, int, int], None]  # (name, images done, images in all)


@dataclass(frozen=True, kw_only=True)
class ImagesToEncode:
    """Images to compute features of."""

    name: str  # for messages and the file's name
    source: SampleSource
    exif: Exif = "ignore"


class FeatureStore:
    """A folder of features. All processes of the run call it, and share its file system."""

    def __init__(
        self, folder: Path, world: World, *, batch_size: int = 64, workers: int = 0, advance: Advance | None = None
    ) -> None:
        """`advance(name, done, total)` is called on process 0 with those of its images that are done."""
        self.folder, self.world = folder, world
        self._batch_size, self._workers = batch_size, workers
        self._advance = advance or (lambda name, done, total: None)

    def features(
        self,
        encoder: VisionTransformer,
        transform: ImageTransform,
        images: ImagesToEncode,
        pools: Sequence[Pool],
        *,
        tried: bool = False,
    ) -> dict[str, np.ndarray]:
        """Returns the features of all images in the order of the source, memory-mapped, by the name of their pool.

        They are (N, W) float32, and of `tokens` (N, patches, D) float16. Those that are missing are computed in one
        pass over the images. An earlier run's are taken if they are of these weights and images; one that was
        interrupted is continued. The encoder is on this process's device. Unless the images were `tried` before, all
        are decoded first.

        Raises:
            DataError: images can't be read or decoded, tokens don't fit float16, or the disk is full.
            ConfigError: the encoder doesn't have a pool.
        """
        for pool in pools:
            check_pool(encoder, pool)
        key = self._key(encoder, transform, images) if self.world.is_main else None
        key = self.world.broadcast_object(key)  # type: ignore[assignment]  # files may be older on another host
        paths = {pool: self.folder / f"{images.name}-{pool}-{key}.npy" for pool in pools}
        count = images.source.num_samples
        missing = [pool for pool in pools if opened(paths[pool], count) is None] if self.world.is_main else []
        missing = self.world.broadcast_object(missing)  # type: ignore[assignment]
        if missing:
            if not tried:
                self.check(transform, images)
            parts = Parts(
                self.folder / f"{images.name}-{'-'.join(missing)}-{key}-{self._batch_size}.parts",
                images.source.num_samples, batch_size=self._batch_size,
            )  # fmt: skip
            parts.compute(
                _Batches(_read(transform, images)), lambda pixels: _encoded(encoder, pixels, missing),
                world=self.world, workers=self._workers, advance=lambda *done: self._advance(images.name, *done),
            )  # fmt: skip
            problem = _join(parts, {pool: paths[pool] for pool in missing}) if self.world.is_main else None
            problem = self.world.broadcast_object(problem)  # type: ignore[assignment]
            if problem is not None:
                raise DataError(problem)
        return {pool: np.load(path, mmap_mode="r") for pool, path in paths.items()}

    def check(self, transform: ImageTransform, images: ImagesToEncode) -> None:
        """Decodes all images once. Communicates.

        Raises:
            DataError: some can't be used.
        """
        check_images(
            images.source, np.arange(images.source.num_samples), images.name, world=self.world, exif=images.exif,
            pixels=transform.format, workers=self._workers,
        )  # fmt: skip

    def tokens(
        self, encoder: VisionTransformer, transform: ImageTransform, images: ImagesToEncode, batches: list[np.ndarray]
    ) -> Iterator[Tensor]:
        """Yields the tokens (n, patches, D) float32 of each batch of numbers, on every process, and keeps none.

        Processes share the images of a batch. Communicates, so every process must take all batches. What is encoded
        together doesn't depend on the number of processes.

        Raises:
            DataError: images can't be read or decoded.
        """
        world, most = self.world, self._batch_size
        cuts = [[batch[begin : begin + most] for begin in range(0, len(batch), most)] for batch in batches]
        mine = [
            cut[begin + world.rank] if begin + world.rank < len(cut) else cut[0]  # a process without work repeats some
            for cut in cuts for begin in range(0, len(cut), world.size)
        ]  # fmt: skip
        loaded = iter(ordered_loader(_read(transform, images), mine, workers=self._workers, prefetch=2))
        for batch, cut in zip(batches, cuts, strict=True):
            rounds = []
            for _ in range(0, len(cut), world.size):
                found = next(loaded)
                if isinstance(found, str):
                    raise DataError(found)
                with torch.no_grad():
                    tokens = encoder(found.images.to(world.device)).float()
                padded = tokens.new_zeros(most, *tokens.shape[1:])
                padded[: len(tokens)] = tokens
                rounds.append(world.gather(padded).flatten(0, 1))
            yield torch.cat(rounds)[: len(batch)]

    def _key(self, encoder: VisionTransformer, transform: ImageTransform, images: ImagesToEncode) -> str:
        """Returns 16 hexadecimal digits that change with anything that features depend on."""
        facts: dict[str, Any] = {
            "weights": digest_of_tensors({name: each.cpu() for name, each in encoder.state_dict().items()}),
            "eps": sorted({layer.eps for layer in encoder.modules() if isinstance(layer, LayerNorm)}),
            "heads": sorted({block.attn.heads for block in encoder.modules() if isinstance(block, Block)}),
            "images": contents_of(images.source),
            "count": images.source.num_samples,
            "transform": repr(transform),
            "exif": images.exif,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _join(parts: Parts, paths: dict[Pool, Path]) -> str | None:
    """Writes each pool's file from all parts, and removes these; returns what prevented it, if anything."""
    skipped = [each.reason for part in parts.read() for each in part.skipped.values()]
    if skipped:  # changed since they were tried
        parts.remove()
        return skipped[0]
    try:
        for pool, path in paths.items():
            first = next(parts.read()).values[pool]
            arrays = (part.values[pool].numpy() for part in parts.read())
            write_array(path, (parts.count, *first.shape[1:]), arrays)
        parts.remove()
    except OSError as error:
        folder = parts.folder.parent
        return f"{folder} can't be written ({error.strerror}); free space and start again: parts are kept"
    return None


def _read(transform: ImageTransform, images: ImagesToEncode) -> EvalImages:
    return EvalImages(
        images.source, transform.image_size, transform.crop_fraction, transform.mean, transform.std,
        exif=images.exif, pixels=transform.format,
    )  # fmt: skip


@torch.no_grad()
def _encoded(encoder: VisionTransformer, pixels: Tensor, pools: Sequence[Pool]) -> dict[str, Tensor]:
    """Returns the features of a batch by the name of their pool, all from one forward pass."""
    layers = [each.float() for each in encoder(pixels, last=4 if "last4" in pools else 1)]
    found: dict[str, Tensor] = {}
    for pool in pools:
        if pool == "tokens":
            found[pool] = layers[-1].half()
            if not torch.isfinite(found[pool]).all():  # host sync
                raise DataError(
                    f"tokens of up to {float(layers[-1].abs().max()):.3g} don't fit float16, in which they are kept; "
                    "for attentive probes give --token-gb 0, which keeps none"
                )
        else:
            kept = layers if pool == "last4" else layers[-1:]
            found[pool] = torch.cat([tokens.mean(dim=1) for tokens in kept], dim=1)
    return found


class _Batches(Dataset[Loaded]):
    """Maps the numbers of images to a batch."""

    def __init__(self, images: EvalImages) -> None:
        self._images = images

    def __getitem__(self, numbers: list[int]) -> Loaded:
        batch = self._images[np.array(numbers)]
        if isinstance(batch, str):
            return Loaded(torch.empty(0), [], {numbers[0]: Skipped(batch)})
        return Loaded(batch.images, numbers, {})

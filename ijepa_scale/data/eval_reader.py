"""Images for evaluation: resized, centre-cropped and normalised as published.

Knows nothing of models or of other processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ijepa_scale.config.data import IMAGENET_MEAN, IMAGENET_STD
from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.deep_decode import decode_as, resize_deep
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError

_CROP_FRACTION = 0.875  # 224 of 256 pixels
_TRIED = 64  # images that a worker tries at once
_SMALL = 64  # pixels: up to this size the crop fraction is 1


@dataclass(frozen=True)
class EvalBatch:
    """Images in the order of the given ids; the last batch may be smaller."""

    images: Tensor  # (B, C, h, w) float32, normalised
    labels: Tensor  # (B,) int64; -1 if there is none
    sample_ids: np.ndarray  # (B,) int64

    def __len__(self) -> int:
        return len(self.sample_ids)

    def pin_memory(self) -> EvalBatch:
        """Returns the batch with its tensors in page-locked memory."""
        return EvalBatch(self.images.pin_memory(), self.labels.pin_memory(), self.sample_ids)


def spread(count: int, chosen: int) -> np.ndarray:
    """Returns `chosen` ids spread evenly over range(count), int64, ascending; all of them if there are no more."""
    chosen = min(count, chosen)
    return (np.arange(chosen, dtype=np.int64) * count) // max(1, chosen)


def center_crop(pixels: np.ndarray, size: tuple[int, int], crop_fraction: float) -> np.ndarray:
    """Resizes an image (PIL bicubic) to cover size / crop_fraction and returns its centre, (h, w, C) of its type.

    For a square `size` this equals torchvision's Resize(round(size / crop_fraction)) and CenterCrop(size).
    """
    height, width = pixels.shape[:2]
    resized = covering_size((height, width), size, crop_fraction)
    if resized == (height, width):
        found = pixels
    elif pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        found = np.asarray(Image.fromarray(pixels).resize((resized[1], resized[0]), Image.Resampling.BICUBIC))
    else:
        found = resize_deep(pixels, resized, Image.Resampling.BICUBIC)
    top, left = (round((have - want) / 2.0) for have, want in zip(resized, size, strict=True))
    return found[top : top + size[0], left : left + size[1]]


def covering_size(have: tuple[int, int], size: tuple[int, int], crop_fraction: float) -> tuple[int, int]:
    """Returns the (height, width) that an image is resized to before `size` is cut from its centre."""
    height, width = have
    cover = [round(side / crop_fraction) for side in size]
    if height * cover[1] <= width * cover[0]:  # the height is the tighter side
        return cover[0], max(cover[1], int(cover[0] * width / height))
    return max(cover[0], int(cover[1] * height / width)), cover[1]


def crop_fraction_of(image_size: tuple[int, int]) -> float:
    """Returns the share of a resized image that the centre crop covers by default, for images of that size, pixels."""
    return _CROP_FRACTION if min(image_size) > _SMALL else 1.0


class EvalReader:
    """Iterates over the given samples in the given order, as `EvalBatch`es.

    `crop_fraction` defaults to 0.875 for images above 64 pixels and to 1 otherwise. A sample that can't be decoded
    ends the evaluation: a result over a different set of images couldn't be compared with others.
    """

    def __init__(
        self,
        source: SampleSource,
        image_size: tuple[int, int],
        *,
        ids: Sequence[int] | np.ndarray,
        batch_size: int = 64,
        crop_fraction: float | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        exif: Exif = "ignore",
        pixels: PixelFormat = RGB8,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        if crop_fraction is None:
            crop_fraction = crop_fraction_of(image_size)
        batches = EvalImages(source, image_size, crop_fraction, mean, std, exif=exif, pixels=pixels)
        parts = [self.ids[begin : begin + batch_size] for begin in range(0, len(self.ids), batch_size)]
        self._batches = ordered_loader(batches, parts, workers=workers, prefetch=prefetch)
        self._pin_memory = pin_memory and torch.cuda.is_available()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[EvalBatch]:
        for item in self._batches:
            if isinstance(item, str):
                raise DataError(item)
            # not in a thread of torch's loader, which waits for ever for a batch that a killed worker has half sent
            yield item.pin_memory() if self._pin_memory else item


def read_usable(
    source: SampleSource,
    image_size: tuple[int, int],
    ids: np.ndarray,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    exif: Exif = "ignore",
    pixels: PixelFormat = RGB8,
) -> tuple[list[Tensor], dict[int, str]]:
    """Returns those of the given samples that can be decoded, each (1, C, h, w) as `EvalReader` gives it, in order.

    Second, the ids of the others with the reasons.
    """
    batches = EvalImages(source, image_size, crop_fraction_of(image_size), mean, std, exif=exif, pixels=pixels)
    found = [batches[ids[row : row + 1]] for row in range(len(ids))]
    images = [each.images for each in found if isinstance(each, EvalBatch)]
    return images, {int(number): text for number, text in zip(ids, found, strict=True) if isinstance(text, str)}


def bad_images(
    source: SampleSource, ids: np.ndarray, *, exif: Exif = "ignore", pixels: PixelFormat = RGB8, workers: int = 0
) -> list[str]:
    """Returns the name of each of the given samples that can't be read or decoded, and why. Decodes all of them."""
    parts = [ids[begin : begin + _TRIED] for begin in range(0, len(ids), _TRIED)]
    found = ordered_loader(_Trials(source, exif, pixels), parts, workers=workers, prefetch=2)
    return [bad for part in found for bad in part]


class _Trials(Dataset):
    """Maps ids to the names of those samples that can't be used, and why."""

    def __init__(self, source: SampleSource, exif: Exif, pixels: PixelFormat) -> None:
        self._source, self._pixels = source, pixels
        self._exif: Exif = exif

    def __getitem__(self, ids: np.ndarray) -> list[str]:
        bad = []
        for sample in ids.tolist():
            try:
                decode_as(self._pixels, self._source.read(sample), self._exif)
            except DataError as error:
                bad.append(f"{self._source.name(sample)} ({error})")
        return bad


class EvalImages(Dataset["EvalBatch | str"]):
    """Maps ids to the batch of those samples, or to the text of the error that ends the evaluation."""

    def __init__(
        self,
        source: SampleSource,
        image_size: tuple[int, int],
        crop_fraction: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        exif: Exif,
        pixels: PixelFormat,
    ) -> None:
        self.exif: Exif = exif
        self.pixels = pixels
        self.source, self.image_size, self.crop_fraction = source, image_size, crop_fraction
        self.scale = torch.tensor([1.0 / (pixels.white * value) for value in std])[:, None, None]
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])[:, None, None]

    def __getitem__(self, ids: np.ndarray) -> EvalBatch | str:
        images, labels = [], []
        for sample in ids.tolist():
            try:
                pixels = decode_as(self.pixels, self.source.read(sample), self.exif)
            except DataError as error:
                return f"sample {self.source.name(sample)}: {error}"
            images.append(center_crop(pixels, self.image_size, self.crop_fraction))
            labels.append(self.source.label(sample))
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return EvalBatch(stacked.float().mul_(self.scale).add_(self.shift), torch.tensor(labels), ids)

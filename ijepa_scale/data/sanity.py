"""Looks at a few images and the labels at the start of a run, and says what can hardly be meant. Never stops a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.deep_decode import decode_as, resize_deep
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.errors import DataError

_NUM_IMAGES = 16
_FAR_MEAN, _SMALL_STD, _LARGE_STD = 3.0, 0.05, 10.0  # of normalised pixels; white is 2.6 with ImageNet's values
_THUMBNAIL = (32, 32)
_ALIKE = 2  # levels of 255
_ALIKE_SHARE = 30  # of a standard deviation: about the same for photographs
_UNITS = {
    "uint8": "from 0 to 1, not 0 to 255", "uint16": "from 0 to 1, not 0 to 65535", "float32": "as the files have them",
}  # fmt: skip


def sanity_warnings(
    source: SampleSource | StreamSource,
    batch: Batch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    exif: Exif = "ignore",
    pixels: PixelFormat = RGB8,
) -> list[str]:
    """Returns warnings about a run's first batch: normalisation far off, all images alike, one class only.

    Reads up to 16 images of the batch again, whole; of a stream it takes the crops. `mean` and `std` normalise values
    in units of the format's white. Synchronises if the batch is on a GPU.
    """
    images, names = _sample(source, batch, exif, pixels)
    found = [*_about_pixels(images, mean, std, pixels), *_about_likeness(images, names, std, pixels)] if images else []
    return found + ([] if isinstance(source, StreamSource) else _about_labels(source))


def _sample(
    source: SampleSource | StreamSource, batch: Batch, exif: Exif, pixels: PixelFormat
) -> tuple[list[np.ndarray], list[str]]:
    """Returns images (h, w, C) and their names."""
    rows = range(min(_NUM_IMAGES, len(batch)))
    if isinstance(source, StreamSource):
        return [batch.crop(row).cpu().numpy() for row in rows], [f"image {row} of the batch" for row in rows]
    images, names = [], []
    for sample in batch.sample_ids[: len(rows)].tolist():
        try:
            images.append(decode_as(pixels, source.read(sample), exif))
        except DataError:  # reported where the batch was read
            continue
        names.append(source.name(sample))
    return images, names


def _about_pixels(
    images: list[np.ndarray], mean: Sequence[float], std: Sequence[float], pixels: PixelFormat
) -> list[str]:
    sums = np.stack([image.mean(axis=(0, 1), dtype=np.float64) for image in images])
    squares = np.stack([np.square(image, dtype=np.float64).mean(axis=(0, 1)) for image in images])
    level = sums.mean(axis=0)
    spread = np.sqrt(np.maximum(0.0, squares.mean(axis=0) - level**2))
    centre = (level / pixels.white - np.array(mean)) / np.array(std)
    width = spread / pixels.white / np.array(std)
    if np.abs(centre).max() <= _FAR_MEAN and width.min() >= _SMALL_STD and width.max() <= _LARGE_STD:
        return []
    return [
        f"normalised pixels of the first batch have mean {_figures(centre)} and standard deviation {_figures(width)} "
        f"({'R, G, B' if pixels.is_rgb8 else 'by channel'}), not about 0 and 1: check augment.mean {_figures(mean)} "
        f"and augment.std {_figures(std)}, which are for pixels {_UNITS[pixels.dtype]}, and the images, whose pixels "
        f"have mean {_figures(level)}{'' if pixels.dtype == 'float32' else f' of {pixels.white:g}'}"
    ]


def _about_likeness(images: list[np.ndarray], names: list[str], std: Sequence[float], pixels: PixelFormat) -> list[str]:
    small = np.stack([resize_deep(one, _THUMBNAIL, Image.Resampling.BOX) for one in images])
    # the values of 16-bit images often fill a small part of the range, and floats have none
    limit, unit = (_ALIKE, f"{_ALIKE} of 255 levels") if pixels.dtype == "uint8" else (
        np.array(std) * pixels.white / _ALIKE_SHARE, f"1/{_ALIKE_SHARE} of a standard deviation")  # fmt: skip
    if len(images) < 2 or (np.ptp(small.astype(np.float64), axis=0) > limit).any():
        return []
    return [
        f"the first {len(images)} images are alike, within {unit} at {_THUMBNAIL[0]} x {_THUMBNAIL[1]} "
        f"pixels ({names[0]}, {names[1]}, ...): check that data.train holds the images you mean"
    ]


def _about_labels(source: SampleSource) -> list[str]:
    try:
        labels = source.labels()
    except DataError:  # names that no list numbers; only finetuning needs them, and refuses them
        return []
    if len(labels) < 2 or labels[0] < 0 or (labels != labels[0]).any():
        return []
    name = f" ({source.classes[labels[0]]!r})" if source.classes and labels[0] < len(source.classes) else ""
    return [
        f"all {len(labels)} images have the label {labels[0]}{name}: check that data.train names the folder whose "
        "sub-folders are the classes, or shards with the labels you mean"
    ]


def _figures(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


__all__ = ["sanity_warnings"]

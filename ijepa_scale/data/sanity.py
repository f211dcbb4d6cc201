"""Looks at a few images and the labels at the start of a run, and says what can hardly be meant. Never stops a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ijepa_scale.config.form import Exif
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import decode
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.errors import DataError

_NUM_IMAGES = 16
_FAR_MEAN, _SMALL_STD, _LARGE_STD = 3.0, 0.05, 10.0  # of normalised pixels; white is 2.6 with ImageNet's values
_THUMBNAIL = (32, 32)
_ALIKE = 2  # levels of 255


def sanity_warnings(
    source: SampleSource | StreamSource,
    batch: Batch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    exif: Exif = "ignore",
) -> list[str]:
    """Returns warnings about a run's first batch: normalisation far off, all images alike, one class only.

    Reads up to 16 images of the batch again, whole; of a stream it takes the crops. `mean` and `std` normalise RGB in
    [0, 1]. Synchronises if the batch is on a GPU.
    """
    images, names = _sample(source, batch, exif)
    found = [*_about_pixels(images, mean, std), *_about_likeness(images, names)] if images else []
    return found + ([] if isinstance(source, StreamSource) else _about_labels(source))


def _sample(source: SampleSource | StreamSource, batch: Batch, exif: Exif) -> tuple[list[np.ndarray], list[str]]:
    """Returns images (h, w, 3) uint8 and their names."""
    rows = range(min(_NUM_IMAGES, len(batch)))
    if isinstance(source, StreamSource):
        return [batch.crop(row).cpu().numpy() for row in rows], [f"image {row} of the batch" for row in rows]
    images, names = [], []
    for sample in batch.sample_ids[: len(rows)].tolist():
        try:
            images.append(decode(source.read(sample), exif))
        except DataError:  # reported where the batch was read
            continue
        names.append(source.name(sample))
    return images, names


def _about_pixels(images: list[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> list[str]:
    sums = np.stack([image.mean(axis=(0, 1), dtype=np.float64) for image in images])
    squares = np.stack([np.square(image, dtype=np.float64).mean(axis=(0, 1)) for image in images])
    level = sums.mean(axis=0)
    spread = np.sqrt(np.maximum(0.0, squares.mean(axis=0) - level**2))
    centre = (level / 255.0 - np.array(mean)) / np.array(std)
    width = spread / 255.0 / np.array(std)
    if np.abs(centre).max() <= _FAR_MEAN and width.min() >= _SMALL_STD and width.max() <= _LARGE_STD:
        return []
    return [
        f"normalised pixels of the first batch have mean {_figures(centre)} and standard deviation {_figures(width)} "
        f"(R, G, B), not about 0 and 1: check augment.mean {_figures(mean)} and augment.std {_figures(std)}, which "
        f"are for pixels from 0 to 1, not 0 to 255, and the images, whose pixels have mean {_figures(level)} of 255"
    ]


def _about_likeness(images: list[np.ndarray], names: list[str]) -> list[str]:
    small = np.stack([np.asarray(Image.fromarray(one).resize(_THUMBNAIL, Image.Resampling.BOX)) for one in images])
    if len(images) < 2 or np.ptp(small, axis=0).max() > _ALIKE:
        return []
    return [
        f"the first {len(images)} images are alike, within {_ALIKE} of 255 levels at {_THUMBNAIL[0]} x {_THUMBNAIL[1]} "
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

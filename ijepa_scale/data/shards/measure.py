"""Measures the mean and standard deviation of each channel over all pixels of a set. Knows nothing of terminals.

Integers are summed exactly, floats in float64 image by image, in the order of the set. So the result doesn't depend on
the number of processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch.utils.data import Dataset

from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.deep_decode import decode_as
from ijepa_scale.data.shards.make import MAX_BAD_FRACTION
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.statistics import Statistics
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError, SampleError

logger = logging.getLogger(__name__)

_CHUNK = 16  # images that a worker returns at once
_PREFETCH = 2
_BLOCK = 1 << 16  # pixels that are widened at once


class Sums:
    """Exact sums of integers and of their squares, by channel."""

    def __init__(self, channels: int) -> None:
        self._count, self._sums, self._squares = 0, [0] * channels, [0] * channels

    def add(self, pixels: np.ndarray) -> None:
        """Adds (N, C) unsigned integers of up to 16 bits, N up to 2^32."""
        wide = pixels.astype(np.uint64)
        self._count += len(wide)
        self._sums = [a + int(b) for a, b in zip(self._sums, wide.sum(axis=0), strict=True)]
        self._squares = [a + int(b) for a, b in zip(self._squares, (wide * wide).sum(axis=0), strict=True)]

    def merge(self, other: Sums) -> None:
        """Adds what another one has."""
        self._count += other._count
        self._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        self._squares = [a + b for a, b in zip(self._squares, other._squares, strict=True)]

    def result(self, white: float) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """Returns the number of pixels, and mean and standard deviation in units of white, correctly rounded."""
        count, unit = self._count, int(white)
        mean = [float(Fraction(total, count * unit)) for total in self._sums]
        spread = [count * square - total * total for total, square in zip(self._sums, self._squares, strict=True)]
        return count, tuple(mean), tuple(math.sqrt(Fraction(value, (count * unit) ** 2)) for value in spread)


class Moments:
    """Mean and sum of squared deviations of floats, by channel, in float64.

    Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979, equations 2.1.
    """

    def __init__(self, channels: int) -> None:
        self._count, self._mean, self._squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, pixels: np.ndarray) -> None:
        """Adds (N, C) floats."""
        wide = pixels.astype(np.float64)
        part = Moments(wide.shape[1])
        part._count, part._mean = len(wide), wide.mean(axis=0)
        part._squares = np.square(wide - part._mean).sum(axis=0)
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Adds what another one has."""
        count = self._count + other._count
        if not count:
            return
        apart = other._mean - self._mean
        self._mean = self._mean + apart * (other._count / count)
        self._squares = self._squares + other._squares + apart * apart * (self._count * other._count / count)
        self._count = count

    def result(self, white: float) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """Returns the number of pixels, and mean and standard deviation in units of white."""
        deviation = np.sqrt(self._squares / self._count) / white
        return self._count, tuple((self._mean / white).tolist()), tuple(deviation.tolist())


@dataclass(frozen=True)
class _Bad:
    name: str
    reason: str


def measure(
    source: SampleSource,
    pixels: PixelFormat,
    *,
    exif: Exif = "ignore",
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    progress: Callable[[int, int], None] = lambda done, bad: None,
) -> Statistics:
    """Returns the statistics of all pixels of the images that can be used. Logs the others, and reads them all.

    Calls `progress` with the number of images done and of those left out.

    Raises:
        DataError: the set can't be read; more than `max_bad_fraction` of the images can't be used; or a channel has
            the same value everywhere, by which nothing can be divided.
    """
    total = source.num_samples
    parts = [np.arange(begin, min(begin + _CHUNK, total)) for begin in range(0, total, _CHUNK)]
    whole, done, bad = _empty(pixels), 0, 0
    chunks = ordered_loader(_Images(source, pixels, exif), parts, workers=workers, prefetch=_PREFETCH)
    for ids, chunk in zip(parts, chunks, strict=True):
        if isinstance(chunk, str):
            raise DataError(chunk)
        for image in chunk:
            if not isinstance(image, _Bad):
                whole.merge(image)
                continue
            bad += 1
            logger.warning("left out: %s: %s", image.name, image.reason)
            if bad > max_bad_fraction * total:
                raise DataError(
                    f"{bad} of {total} images can't be used, over the allowed fraction {max_bad_fraction:g}; the last "
                    f"is {image.name} ({image.reason}); fix the data, or raise --max-bad-fraction"
                )
        done += len(ids)
        progress(done, bad)
    count, mean, std = whole.result(pixels.white)
    constant = [channel for channel, value in enumerate(std) if value == 0]
    if constant:
        raise DataError(f"channel {constant[0]} has the value {mean[constant[0]]:g} in all pixels; drop that channel")
    return Statistics(pixels.channels, pixels.dtype, total - bad, count, source.fingerprint, mean, std)


def _empty(pixels: PixelFormat) -> Sums | Moments:
    return Moments(pixels.channels) if pixels.dtype == "float32" else Sums(pixels.channels)


class _Images(Dataset):
    """Maps ids to the sums of each image, or to the text of the error that ends the run."""

    def __init__(self, source: SampleSource, pixels: PixelFormat, exif: Exif) -> None:
        self._source, self._pixels = source, pixels
        self._exif: Exif = exif

    def __getitem__(self, ids: np.ndarray) -> list[Sums | Moments | _Bad] | str:
        try:
            return [self._one(int(sample)) for sample in ids]
        except DataError as error:
            return str(error)

    def _one(self, sample: int) -> Sums | Moments | _Bad:
        try:
            image = decode_as(self._pixels, self._source.read(sample), self._exif)
        except SampleError as error:
            return _Bad(self._source.name(sample), str(error))
        found = _empty(self._pixels)
        flat = image.reshape(-1, image.shape[2])
        for begin in range(0, len(flat), _BLOCK):
            found.add(flat[begin : begin + _BLOCK])
        return found


__all__ = ["Moments", "Sums", "measure"]

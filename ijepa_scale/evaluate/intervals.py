"""Confidence intervals over test images. Knows nothing of what was classified."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ijepa_scale import rng

_RESAMPLES = 10_000
_FEWER, _AT_ONCE = 2_000, 100  # resamples of figures that aren't a share of the images; those computed at once


def accuracy_interval(correct: int, total: int, *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Returns the bootstrap percentile interval of the share correct / total, from 0 to 1.

    Drawing `total` of the images again, with replacement, leaves a binomial number of correct ones, so that number is
    drawn instead. It covers the choice of the test images only, not that of the training run.

    Raises:
        ValueError: there are no images.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(
            f"{correct} of {total} are correct; give at least 1 image, and no more correct ones than images"
        )
    generator = np.random.Generator(np.random.Philox(key=rng.key(seed, "bootstrap")))
    shares = generator.binomial(total, correct / total, size=_RESAMPLES) / total
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_intervals(
    images: np.ndarray, figures: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, level: float = 0.95
) -> np.ndarray:
    """Returns the bootstrap percentile intervals (F, 2) of F figures that sums over the test images give.

    `images` (N, K) are each image's numbers. `figures` maps sums (R, K), float64, over N images that are drawn with
    replacement, to values (R, F); NaN is left out. An interval covers the choice of the test images only, not that of
    the training run.

    Raises:
        ValueError: there are no images.
    """
    count = len(images)
    if not count:
        raise ValueError("0 images have no interval; give at least 1")
    generator = np.random.Generator(np.random.Philox(key=rng.key(seed, "bootstrap")))
    numbers, values = images.astype(np.float64), []
    for _ in range(_FEWER // _AT_ONCE):
        drawn = generator.integers(0, count, (_AT_ONCE, count))
        times = np.stack([np.bincount(row, minlength=count) for row in drawn])
        values.append(figures(times.astype(np.float64) @ numbers))
    return np.nanquantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2], axis=0).T

"""Confidence intervals of accuracies. Knows nothing of what was classified."""

from __future__ import annotations

import numpy as np

from ijepa_scale import rng

_RESAMPLES = 10_000


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

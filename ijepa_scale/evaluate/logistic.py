"""Logistic regression on frozen features, and subsets of a few images per class. Knows nothing of models or images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ijepa_scale import rng
from ijepa_scale.errors import ConfigError, DataError

STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # inverse of the L2 penalty, scikit-learn's C
_ITERATIONS = 1_000
_HELD_OUT = 5  # one image in so many chooses the strength


@dataclass(frozen=True, kw_only=True)
class LogisticResult:
    """What logistic regression predicts."""

    predicted: np.ndarray  # (M,) int64, classes of the test features
    strength: float  # the chosen C


def logistic_regression(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    seed: int = 0,
) -> LogisticResult:
    """Returns the classes of test features (M, D), learned from train features (N, D) with labels (N,).

    Features are standardised by the training features. The strength of the L2 penalty is the one that classifies a
    fifth of the training images best, learned from the others; classes of one image are always learned from. With one
    strength nothing is held out, and without a class of two images the strength is 1. scikit-learn's L-BFGS minimises.

    Raises:
        ConfigError: scikit-learn isn't installed.
        DataError: fewer than two classes.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ConfigError(
            "logistic regression needs scikit-learn; install it with pip install 'ijepa_scale[evaluate]'"
        ) from None
    if len(np.unique(labels)) < 2:
        raise DataError(f"{len(labels)} training images of one class; logistic regression needs two classes or more")
    mean, spread = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(spread > 0, spread, 1.0)
    inputs, outputs = ((part - mean) / scale for part in (train, test))

    def fitted(rows: np.ndarray, strength: float) -> LogisticRegression:
        model = LogisticRegression(C=strength, max_iter=_ITERATIONS)
        return model.fit(inputs[rows], labels[rows])

    chosen, everything = strengths[0], np.arange(len(labels))
    held = held_out(labels, seed)
    if len(strengths) > 1 and not len(held):
        chosen = 1.0
    elif len(strengths) > 1:
        kept = np.setdiff1d(everything, held)
        scores = {each: float((fitted(kept, each).predict(inputs[held]) == labels[held]).mean()) for each in strengths}
        chosen = max(scores, key=scores.__getitem__)  # the strongest penalty of equal ones
    return LogisticResult(predicted=fitted(everything, chosen).predict(outputs).astype(np.int64), strength=chosen)


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns sorted rows of about a fifth of the images of each class, at least 1 where a class has 2 or more."""
    rows = []
    for label in np.unique(labels).tolist():
        mine = np.flatnonzero(labels == label)
        count = max(len(mine) // _HELD_OUT, int(len(mine) > 1))
        rows.append(mine[rng.permutation(len(mine), seed, "held-out", label)[:count]])
    return np.sort(np.concatenate(rows))


def few_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Returns sorted rows of `shots` images of each class, drawn without replacement, keyed by seed and class.

    The first images of a larger draw are those of a smaller one.

    Raises:
        DataError: a class has fewer images.
    """
    rows = []
    for label in np.unique(labels).tolist():
        mine = np.flatnonzero(labels == label)
        if len(mine) < shots:
            raise DataError(f"class {label} has {len(mine)} images, fewer than {shots} shots; use at most {len(mine)}")
        rows.append(mine[rng.permutation(len(mine), seed, "few-shots", label)[:shots]])
    return np.sort(np.concatenate(rows))

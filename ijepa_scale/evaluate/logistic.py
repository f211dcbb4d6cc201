"""Logistic regression on frozen features, and subsets of a few images per class. Knows nothing of models or images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ijepa_scale import rng
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted

logger = logging.getLogger(__name__)

STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # inverse of the L2 penalty, scikit-learn's C
_ITERATIONS, _TOLERANCE = 1_000, 1e-4  # of the largest derivative of the mean loss
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
    device: torch.device | str = "cpu",
) -> LogisticResult:
    """Returns the classes of test features (M, D), learned from train features (N, D) with labels (N,).

    Features are standardised by the training features. The strength of the L2 penalty is the one that classifies a
    fifth of the training images best, learned from the others; classes of one image are always learned from. With one
    strength nothing is held out, and without a class of two images the strength is 1.

    Raises:
        DataError: fewer than two classes.
    """
    known, targets = np.unique(labels, return_inverse=True)
    if len(known) < 2:
        raise DataError(f"{len(labels)} training images of one class; logistic regression needs two classes or more")
    mean, spread = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(spread > 0, spread, 1.0)
    inputs, outputs = (torch.from_numpy((part - mean) / scale).to(device) for part in (train, test))
    answers = torch.from_numpy(targets).to(device)
    chosen, held = strengths[0], held_out(labels, seed)
    if len(strengths) > 1 and not len(held):
        chosen = 1.0
    elif len(strengths) > 1:
        kept = np.setdiff1d(np.arange(len(labels)), held)
        fits = _fits(inputs[kept], answers[kept], len(known), strengths)
        right = {
            each: int((fit(inputs[held]) == answers[held]).sum()) for each, fit in zip(strengths, fits, strict=True)
        }
        chosen = max(right, key=right.__getitem__)  # the strongest penalty of equal ones
    (fit,) = _fits(inputs, answers, len(known), [chosen])
    return LogisticResult(predicted=known[fit(outputs).cpu().numpy()].astype(np.int64), strength=chosen)


def _fits(
    inputs: Tensor, targets: Tensor, num_classes: int, strengths: Sequence[float]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields the classifier of each strength: features (n, D) -> classes (n,). The next one starts from its weights.

    It minimises the sum of the cross-entropies, times the strength, plus half the squared weights, without biases.
    L-BFGS does so in the features' principal components, each divided by the root of its curvature when all classes are
    equally likely: features of trained encoders are so correlated that without this, 1000 iterations don't suffice.
    """
    count, width = inputs.shape
    if count < width:
        basis = torch.linalg.svd(inputs, full_matrices=False)[2].T  # (D, r): weights outside of it would be 0
    else:
        basis = torch.linalg.eigh(inputs.T @ inputs)[1]
    parts = inputs @ basis
    spread = parts.square().mean(dim=0)[:, None]  # (r, 1)
    weights, bias = parts.new_zeros(parts.shape[1], num_classes), parts.new_zeros(num_classes)
    for strength in strengths:
        penalty = 1.0 / (strength * count)
        root = (spread * (num_classes - 1) / num_classes**2 + penalty).rsqrt()
        scaled = (weights / root).requires_grad_()
        bias = bias.detach().requires_grad_()
        solver = torch.optim.LBFGS(
            [scaled, bias], max_iter=_ITERATIONS, max_eval=2 * _ITERATIONS, history_size=20,
            tolerance_grad=_TOLERANCE, tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            solver.zero_grad()  # noqa: B023 - called within this round only
            found = scaled * root  # noqa: B023
            value = cross_entropy(parts @ found + bias, targets) + 0.5 * penalty * found.square().sum()  # noqa: B023
            value.backward()
            return value

        solver.step(loss)
        if max(float(each.grad.abs().max()) for each in (scaled, bias) if each.grad is not None) > _TOLERANCE:
            logger.warning("logistic regression at C %g didn't converge in %d iterations", strength, _ITERATIONS)
        weights = (scaled * root).detach()
        whole, shift = basis @ weights, bias.detach()
        yield partial(_classes, weights=whole, bias=shift)


def _classes(features: Tensor, *, weights: Tensor, bias: Tensor) -> Tensor:
    return (features @ weights + bias).argmax(dim=1)


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
            raise DataError(
                f"class {label} has {counted(len(mine), 'image')}, fewer than {shots} shots; use at most {len(mine)}"
            )
        rows.append(mine[rng.permutation(len(mine), seed, "few-shots", label)[:shots]])
    return np.sort(np.concatenate(rows))


def share_of(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns sorted rows of a share of the images of each class, at least 1, keyed by seed and class."""
    rows = []
    for label in np.unique(labels).tolist():
        mine = np.flatnonzero(labels == label)
        rows.append(mine[rng.permutation(len(mine), seed, "few-shots", label)[: max(1, round(share * len(mine)))]])
    return np.sort(np.concatenate(rows))

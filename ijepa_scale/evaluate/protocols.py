"""Protocols that classify images by frozen features. Knows nothing of encoders or files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.intervals import accuracy_interval
from ijepa_scale.evaluate.knn import knn_sweep
from ijepa_scale.evaluate.linear_probe import LARGER_RATES, ProbeRecipe, fit_probes, sweep
from ijepa_scale.evaluate.logistic import few_shots, logistic_regression, share_of
from ijepa_scale.plurals import counted

NEIGHBORS, TEMPERATURES = (5, 10, 20, 50, 100, 200), (0.03, 0.07, 0.2)
USUAL = (20, 0.07)  # of kNN, stated next to the best of the sweep. Source: arXiv 2104.14294, section 4
FINETUNED = ", finetuned"  # ends the names of scores of finetuned encoders
SHARES = (0.01, 0.1)  # of the training images of each class, for the low-shot protocol


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Features of labelled images: of the last block, or of the last four side by side, the last one at the end."""

    features: np.ndarray  # (N, D) or (N, 4 * D) float32, possibly memory-mapped
    labels: np.ndarray  # (N,) int64

    def last(self, width: int) -> np.ndarray:
        """Returns the last block's features, (N, width)."""
        return np.array(self.features[:, -width:])  # in memory, whatever the features are


@dataclass(frozen=True, kw_only=True)
class Score:
    """The accuracy of one protocol, from 0 to 1."""

    protocol: str
    setting: str  # what was chosen
    accuracy: float
    low: float  # bounds of the 95% interval over the test images, or of the seeds
    high: float
    note: str = ""  # how it differs from the published protocol


@dataclass(frozen=True, kw_only=True)
class Options:
    """What protocols share."""

    width: int  # D
    num_classes: int
    device: torch.device
    seed: int = 0
    seeds: int = 3  # draws of few images, from `seed` on
    shots: tuple[int, ...] = (1, 5, 10)
    recipe: ProbeRecipe = ProbeRecipe()


def knn(train: Split, test: Split, options: Options) -> list[Score]:
    """Returns kNN with 20 neighbours at temperature 0.07, and the best of a sweep of both."""
    count = len(train.labels)
    neighbors = sorted({min(count, each) for each in (*NEIGHBORS, USUAL[0])})
    usual = (min(count, USUAL[0]), USUAL[1])
    choices = [usual, *((k, t) for k in neighbors for t in TEMPERATURES if (k, t) != usual)]
    predicted = knn_sweep(
        _tensor(train.last(options.width), options), _tensor(train.labels, options),
        _tensor(test.last(options.width), options), choices=choices, num_classes=options.num_classes,
    )  # fmt: skip
    right = (predicted.cpu().numpy() == test.labels).sum(axis=1)
    best = int(right.argmax())
    texts = [f"k {k}, temperature {t:g}" for k, t in choices]
    return [
        scored("knn", texts[0], int(right[0]), len(test.labels)),
        scored("knn, best", texts[best], int(right[best]), len(test.labels), note="chosen on the test images"),
    ]


def linear(train: Split, test: Split, options: Options) -> list[Score]:
    """Returns the linear probe by the published protocol, the best of its sweep, and with larger rates too."""
    layers = ("last", "last4") if train.features.shape[1] == 4 * options.width else ("last",)
    published = sweep(layers=layers)
    probes = [*published, *sweep(LARGER_RATES, layers)]
    fitted = fit_probes(
        train.features, torch.from_numpy(train.labels), probes, width=options.width, num_classes=options.num_classes,
        device=options.device, recipe=options.recipe,
    )  # fmt: skip
    right = (fitted.predict(test.features).cpu().numpy() == test.labels).sum(axis=1)
    best, widest = int(right[: len(published)].argmax()), int(right.argmax())
    note = f"best of {len(published)} on the test images, as published; centre crops instead of augmented ones"
    scores = [scored("linear", probes[best].text(), int(right[best]), len(test.labels), note=note)]
    note = f"best of {len(probes)} on the test images; the published rates suit ImageNet's many steps"
    return [*scores, scored("linear, more rates", probes[widest].text(), int(right[widest]), len(test.labels), note)]


def logistic(train: Split, test: Split, options: Options) -> list[Score]:
    """Returns logistic regression on all training images, its penalty chosen on a fifth of them."""
    found = logistic_regression(
        train.last(options.width), train.labels, test.last(options.width), seed=options.seed, device=options.device,
    )  # fmt: skip
    right = int((found.predicted == test.labels).sum())
    return [scored("logistic", f"C {found.strength:g}", right, len(test.labels))]


def check_labels(labels: np.ndarray, shots: tuple[int, ...], name: str = "") -> None:
    """Checks that training labels (N,) have two classes, and images for the fewest of `shots`, if there are any.

    Raises:
        DataError: they don't. Begins with the set's name, if it has one.
    """
    prefix = f"{name}: " if name else ""
    known, counts = np.unique(labels, return_counts=True)
    if len(known) < 2:
        raise DataError(f"{prefix}{len(labels)} training images of one class; give two classes or more")
    least = int(counts.min())
    if shots and min(shots) > least:
        raise DataError(
            f"{prefix}the smallest class has {least} training images, fewer than {min(shots)} shots; give --shots "
            f"{least}"
        )


def lowshot(train: Split, test: Split, options: Options, *, shares: tuple[float, ...] = SHARES) -> list[Score]:
    """Returns logistic regression on a few training images of each class: mean and range of several draws."""
    check_labels(train.labels, options.shots)
    counts = np.unique(train.labels, return_counts=True)[1]
    least = int(counts.min())
    for shots in options.shots:
        if shots > least:
            logger.warning("%d-shot is left out: the smallest class has %d training images", shots, least)
    scores = [
        _few(f"{shots}-shot", train, test, options, partial(few_shots, train.labels, shots))
        for shots in options.shots
        if shots <= least
    ]
    for share in shares:
        if share * len(train.labels) >= 2 * len(counts):
            name, note = f"{share:.0%} low-shot", "logistic regression instead of finetuning"
            scores.append(_few(name, train, test, options, partial(share_of, train.labels, share), note))
        else:
            logger.info("%.0f%% low-shot is left out: it is under 2 training images a class", 100 * share)
    return scores


def _few(
    name: str, train: Split, test: Split, options: Options, draw: Callable[[int], np.ndarray], note: str = ""
) -> Score:
    features, tested, found = train.last(options.width), test.last(options.width), []
    for seed in range(options.seed, options.seed + options.seeds):
        rows = draw(seed)
        result = logistic_regression(features[rows], train.labels[rows], tested, seed=seed, device=options.device)
        found.append(float((result.predicted == test.labels).mean()))
    setting = f"{counted(len(rows), 'image')}, {counted(options.seeds, 'draw')}"
    return Score(
        protocol=name, setting=setting, accuracy=float(np.mean(found)), low=min(found), high=max(found), note=note
    )


def scored(protocol: str, setting: str, right: int, total: int, note: str = "") -> Score:
    """Returns the score of `right` correct test images of `total`, with its bootstrap interval."""
    low, high = accuracy_interval(right, total)
    return Score(protocol=protocol, setting=setting, accuracy=right / total, low=low, high=high, note=note)


def _tensor(values: np.ndarray, options: Options) -> Tensor:
    return torch.from_numpy(values).to(options.device)


def transfer(train: Split, test: Split, options: Options) -> list[Score]:
    """Returns kNN and logistic regression on all images and on a few of each class, of a further data set."""
    return [knn(train, test, options)[0], *logistic(train, test, options), *lowshot(train, test, options, shares=())]


def means(name: str, sets: Sequence[Sequence[Score]]) -> list[Score]:
    """Returns the mean accuracy over data sets of each protocol that all have, with the lowest and the highest."""
    found = []
    for protocol in [score.protocol for score in sets[0]]:
        mine = [score.accuracy for scores in sets for score in scores if score.protocol == protocol]
        if len(mine) == len(sets):
            setting = f"mean, lowest and highest of {len(sets)} data sets"
            mean = float(np.mean(mine))
            found.append(
                Score(protocol=f"{name}: {protocol}", setting=setting, accuracy=mean, low=min(mine), high=max(mine))
            )
    return found


Protocol = Callable[[Split, Split, Options], list[Score]]
PROTOCOLS: dict[str, Protocol] = {"knn": knn, "linear": linear, "logistic": logistic, "lowshot": lowshot}

"""Top-1 and top-5 accuracy of a classifier on a labelled set.

Each image counts once, whatever the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.eval_reader import EvalReader
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.class_lists import require_labels
from ijepa_scale.evaluate.features import check_images, local_ids, until_asked
from ijepa_scale.metrics.confusion import Confusion

Classify = Callable[[Tensor], Tensor]  # images (B, C, h, w) -> logits (B, C)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The result of an evaluation, the same on every process."""

    top1: float  # 0 to 1
    top5: float  # 0 to 1: the true class is among the 5 likeliest, or among all if there are fewer
    loss: float  # mean cross-entropy, nats
    labels: np.ndarray  # (N,) int64, in the order of the set
    predictions: np.ndarray  # (N,) int64

    def confusion(self, num_classes: int) -> Confusion:
        """Returns which of `num_classes` classes was taken for which."""
        return Confusion.count(self.labels, self.predictions, num_classes)


class ClassifierCheck:
    """Evaluates on all images of a source. Pads the share of each process, but doesn't count the padding.

    Raises:
        DataError: an image has no label, or one outside the classes.
    """

    def __init__(
        self,
        source: SampleSource,
        image_size: tuple[int, int],
        num_classes: int,
        *,
        world: World,
        batch_size: int,
        crop_fraction: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        exif: Exif = "ignore",
        pixels: PixelFormat = RGB8,
        workers: int = 0,
    ) -> None:
        self._source, self._image_size, self._world = source, image_size, world
        self._reading: dict[str, Any] = {"exif": exif, "pixels": pixels, "workers": workers}
        self._options = {"batch_size": batch_size, "crop_fraction": crop_fraction, **self._reading}
        self._normalisation: dict[str, Any] = {"mean": mean, "std": std}
        self.labels = check_labels(source, num_classes, "evaluate.test")

    def try_images(self) -> None:
        """Decodes all images once. Communicates.

        Raises:
            DataError: some can't be used.
        """
        ids = np.arange(self._source.num_samples)
        check_images(self._source, ids, "evaluate.test", world=self._world, **self._reading)

    def run(self, classify: Classify) -> Accuracy:
        """Returns the accuracy of `classify`. Synchronises and communicates, so all processes must call it."""
        world, total = self._world, self._source.num_samples
        ids = local_ids(np.arange(total), world.rank, world.size)
        options = {**self._options, "pin_memory": world.device.type == "cuda"}
        reader = EvalReader(self._source, self._image_size, ids=ids, **options, **self._normalisation)
        parts = []
        for batch in until_asked(reader, world):
            logits = classify(batch.images.to(world.device, non_blocking=True)).float()
            labels = batch.labels.to(world.device, non_blocking=True)
            losses = F.cross_entropy(logits, labels, reduction="none")
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            parts.append(torch.stack([losses, best[:, 0], (best == labels[:, None]).any(dim=1)], dim=1).double())
        rows = world.gather(torch.cat(parts)).flatten(0, 1)[:total].cpu().numpy()  # host sync: once per evaluation
        predictions = rows[:, 1].astype(np.int64)
        return Accuracy(
            top1=float((predictions == self.labels).mean()),
            top5=float(rows[:, 2].mean()),
            loss=float(rows[:, 0].mean()),
            labels=self.labels,
            predictions=predictions,
        )


def check_labels(source: SampleSource, num_classes: int, name: str) -> np.ndarray:
    """Returns all labels of a source, (N,) int64.

    Raises:
        DataError: one is missing or outside range(num_classes).
    """
    labels = source.labels()
    require_labels(source, labels, name)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        found = "no label" if labels[first] < 0 else f"label {labels[first]}"
        more = labels.max() + 1
        remedy = "fix the labels" if more <= num_classes else f"set model.num_classes={more}, or fix the labels"
        raise DataError(
            f"{name}: {len(wrong)} of {len(labels)} images have no label from 0 to {num_classes - 1} (the first is "
            f"{source.name(first)} with {found}); {remedy}"
        )
    return labels


def chance_loss(num_classes: int) -> float:
    """Returns the cross-entropy of guessing at random, in nats."""
    return math.log(num_classes)

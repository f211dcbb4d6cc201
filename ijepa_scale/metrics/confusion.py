"""Which classes are taken for which others. Knows no model; its size is that of the images and classes, not squared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """The confusion matrix as the list of its K cells that aren't 0, by true and then predicted class."""

    num_classes: int  # C
    true: np.ndarray  # (K,) int64
    predicted: np.ndarray  # (K,) int64
    times: np.ndarray  # (K,) int64, images

    @classmethod
    def count(cls, labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> Self:
        """Returns the matrix of true and predicted classes (N,) int64 in range(num_classes)."""
        cells, times = np.unique(labels * num_classes + predictions, return_counts=True)
        true, predicted = np.divmod(cells, num_classes)
        return cls(num_classes=num_classes, true=true, predicted=predicted, times=times)

    @property
    def images(self) -> np.ndarray:
        """The images of each class, (C,) int64."""
        return self._sums(self.true, np.ones_like(self.true, dtype=bool))

    @property
    def guesses(self) -> np.ndarray:
        """How often each class was predicted, (C,) int64."""
        return self._sums(self.predicted, np.ones_like(self.true, dtype=bool))

    @property
    def right(self) -> np.ndarray:
        """How often each class was predicted rightly, (C,) int64."""
        return self._sums(self.true, self.true == self.predicted)

    def worst_mistakes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the class that each class was most often taken for, -1 for none, and how often, (C,) int64 each."""
        wrong = np.flatnonzero(self.true != self.predicted)
        order = wrong[np.lexsort((self.predicted[wrong], -self.times[wrong], self.true[wrong]))]
        classes, first = np.unique(self.true[order], return_index=True)
        taken = np.full(self.num_classes, -1, dtype=np.int64)
        times = np.zeros(self.num_classes, dtype=np.int64)
        taken[classes], times[classes] = self.predicted[order[first]], self.times[order[first]]
        return taken, times

    def most_confused(self, count: int) -> np.ndarray:
        """Returns `count` classes, in order: those in most mistakes, then those with most images."""
        wrong = self.true != self.predicted
        mistakes = self._sums(self.true, wrong) + self._sums(self.predicted, wrong)
        return np.sort(np.lexsort((-self.images, -mistakes))[:count])

    def part(self, classes: np.ndarray) -> np.ndarray:
        """Returns the counts among k classes, (true, predicted), (k, k) int64."""
        place = np.full(self.num_classes, -1, dtype=np.int64)
        place[classes] = np.arange(len(classes))
        rows, columns = place[self.true], place[self.predicted]
        inside = (rows >= 0) & (columns >= 0)
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        counts[rows[inside], columns[inside]] = self.times[inside]
        return counts

    def _sums(self, classes: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Returns the images of these cells by class, (C,) int64."""
        sums = np.zeros(self.num_classes, dtype=np.int64)
        np.add.at(sums, classes[cells], self.times[cells])
        return sums

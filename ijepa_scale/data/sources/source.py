"""What the data path asks of a set of images, and what a run does about the samples that it had to leave out.

Samples are numbered 0 .. num_samples - 1 through the shards in their sorted order. Files are opened at the first
read in each process and read with `os.pread`, so a source may be forked or pickled at any time.
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)


class SampleSource(Protocol):
    """A set of images that can be read in any order."""

    num_samples: int
    shard_sizes: np.ndarray  # (S,) int64, sum = num_samples: samples that lie close together
    fingerprint: str  # changes when the list of samples does, and not when the files move
    classes: list[str] | None  # names by label, where the set has them

    def read(self, sample_id: int) -> bytes | np.ndarray:
        """Returns the encoded image, or its pixels (H, W, 3) uint8 where there is nothing to decode."""

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 where there is none."""

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 where there is none."""

    def name(self, sample_id: int) -> str:
        """Returns what a person calls the sample, for messages."""

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Says which shards are read from now on and which ones after them; returns at once."""

    def problems(self) -> Problems:
        """Returns what the listing of the samples had to leave out."""

    def summary(self) -> str:
        """Returns what there is, for the log."""


def check_problems(problems: Problems, num_samples: int, max_bad_fraction: float, *, log: bool = True) -> None:
    """Logs what the listing of a set left out; with `log` false it only checks.

    Raises:
        DataError: it is more than `max_bad_fraction` of the set.
    """
    bad = problems.counts.total()
    if not bad:
        return
    text = f"{bad} of {bad + num_samples} samples can't be used: {problems.summary()}"
    if bad > max_bad_fraction * (bad + num_samples):
        raise DataError(f"{text}; over data.max_bad_fraction {max_bad_fraction:g}: mend the data or raise the limit")
    if log:
        logger.warning("%s", text)
    for problem in problems.named[1:] if log else ():
        logger.warning("left out: %s: %s", problem.name, problem.reason)

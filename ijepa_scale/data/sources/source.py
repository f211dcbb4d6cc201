"""The protocol of a set of images, and the check of the samples that a listing had to leave out.

Samples are numbered 0 .. num_samples - 1 through the shards in sorted order. Each process opens files at its first
read and reads them with `os.pread`, so a source may be forked or pickled at any time.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np

from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)


class SampleSource(Protocol):
    """A set of images that can be read in any order."""

    num_samples: int
    shard_sizes: np.ndarray  # (S,) int64, sum = num_samples: samples that are stored together
    fingerprint: str  # changes with the list of samples, but not when the files move
    classes: list[str] | None  # names by label, if the set has them

    def read(self, sample_id: int) -> bytes | np.ndarray:
        """Returns the encoded image, or its pixels (H, W, C) if there is nothing to decode.

        Raises:
            SampleError: this sample can't be used.
            DataError: the set can't be read.
        """

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 if there is none."""

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there is none.

        Raises:
            DataError: labels are names that no class list numbers.
        """

    def name(self, sample_id: int) -> str:
        """Returns a readable name of the sample, for messages."""

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Call before reading the shards `now`; the shards `soon` are read after them. Returns at once."""

    def problems(self) -> Problems:
        """Returns the problems that the listing of the samples found: what it had to leave out."""

    def summary(self) -> str:
        """Returns a one-line description, for the log."""


def described(source: Any) -> str:
    """Returns a source in words that are the same wherever its files are: its number of images, and its fingerprint."""
    found = f"{source.num_samples} images, " if hasattr(source, "num_samples") else ""
    return f"{found}{source.fingerprint[:12]}"


def check_whole(source: SampleSource) -> None:
    """Logs what the listing of a set for evaluation passed over, and checks that it left nothing out.

    Raises:
        DataError: it did; results on other images can't be compared.
    """
    problems = source.problems()
    _log_passed_over(problems)
    if problems.counts:
        raise DataError(
            f"{_left_out(problems, source.num_samples)}; an evaluation set must be complete, or results can't be "
            "compared: fix the data, or name a set without them"
        )


def check_problems(
    problems: Problems,
    num_samples: int,
    max_bad_fraction: float,
    *,
    limit: str = "data.max_bad_fraction",
    log: bool = True,
) -> None:
    """Logs what the listing of a set left out or passed over; if `log` is false, only checks it.

    Raises:
        DataError: more than `max_bad_fraction` of the set was left out; names the setting `limit`.
    """
    if log:
        _log_passed_over(problems)
    bad = problems.counts.total()
    if not bad:
        return
    text = _left_out(problems, num_samples)
    if bad > max_bad_fraction * (bad + num_samples):
        raise DataError(f"{text}; over {limit} {max_bad_fraction:g}: fix the data or raise the limit")
    if log:
        logger.warning("%s", text)
    for problem in problems.named[1:] if log else ():
        logger.warning("left out: %s: %s", problem.name, problem.reason)


def _log_passed_over(problems: Problems) -> None:
    passed = problems.passed_over()
    if passed:
        logger.log(logging.WARNING if problems.unread else logging.INFO, "not read: %s", passed)
    for doubt in problems.doubts:
        logger.warning("%s", doubt)


def _left_out(problems: Problems, num_samples: int) -> str:
    bad = problems.counts.total()
    return f"{bad} of {bad + num_samples} samples can't be used: {problems.summary()}"

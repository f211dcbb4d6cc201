"""Compares the measurements of candidates and chooses the winner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ijepa_scale.config import EngineConfig
from ijepa_scale.tune.space import Candidate


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measured steps of a candidate: times are those of the slowest process, peaks those of the largest."""

    candidate: Candidate
    batch_size: int  # images of all processes in one step
    step_s: tuple[float, ...]
    wait_s: tuple[float, ...]  # the part of each step spent waiting for data
    peak_bytes: int  # of one process, over drawn masks
    worst_bytes: int  # of one process, with the longest masks
    flops_per_image: float
    attention: str  # the kernel that ran

    @classmethod
    def of(cls, candidate: Candidate, batch_size: int, values: Sequence[dict[str, Any]]) -> Measurement:
        """Combines the measurements of all processes."""
        return cls(
            candidate=candidate,
            batch_size=batch_size,
            step_s=tuple(np.max([each["step_s"] for each in values], axis=0).tolist()),
            wait_s=tuple(np.max([each["wait_s"] for each in values], axis=0).tolist()),
            peak_bytes=max(each["peak_bytes"] for each in values),
            worst_bytes=max(each["worst_bytes"] for each in values),
            flops_per_image=float(np.mean([each["flops_per_image"] for each in values])),
            attention=values[0]["attention"],
        )

    def with_more(self, other: Measurement) -> Measurement:
        """Combines two measurements of the same candidate."""
        return dataclasses.replace(
            self,
            step_s=self.step_s + other.step_s,
            wait_s=self.wait_s + other.wait_s,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            worst_bytes=max(self.worst_bytes, other.worst_bytes),
        )

    @property
    def rates(self) -> tuple[float, float, float]:
        """Images per second of all processes: the 20th, 50th and 80th percentile over the steps."""
        low, middle, high = np.percentile(self.batch_size / np.asarray(self.step_s), [20, 50, 80])
        return float(low), float(middle), float(high)

    @property
    def step_ms(self) -> float:
        """The time of the median step."""
        return 1e3 * float(np.median(self.step_s))

    def mfu(self, peak_flops: float | None) -> float | None:
        """Returns the share of the devices' peak that the median step reaches; None if no peak is known."""
        return None if peak_flops is None else self.rates[1] * self.flops_per_image / peak_flops


def is_faster(one: Measurement, other: Measurement) -> bool:
    """Returns whether `one` is faster beyond the spread: in at least four of five steps.

    Compares step by step, because all candidates draw the same masks in the same step.
    """
    pairs = list(zip(one.step_s, other.step_s, strict=False))  # finalists have more steps
    return float(np.percentile([theirs / mine for mine, theirs in pairs], 20)) > 1.0


def ranked(measured: Sequence[Measurement]) -> list[Measurement]:
    """Returns the measurements sorted by median rate, the fastest first; equal ones keep their order."""
    return sorted(measured, key=lambda each: -each.rates[1])


def winner(measured: Sequence[Measurement], configured: EngineConfig) -> Measurement:
    """Returns the simplest of the measurements that the fastest one doesn't beat beyond the spread."""
    order = ranked(measured)
    ties = [each for each in order if not is_faster(order[0], each)] or order[:1]
    return min(ties, key=lambda each: each.candidate.simplicity(configured))

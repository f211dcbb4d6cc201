"""Judges the figures of `health`: when features collapse, and what to change. Must not know how they are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ijepa_scale.config import PretrainConfig

_CLEARED = 1.2  # times its limit that every figure must reach before the next alarm


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """A figure that is too low when features collapse."""

    text: str  # what it is, with its values
    value: float
    limit: float


class CollapseAlarm:
    """Raises one alarm for each time that features begin to collapse.

    It goes off when one of its signs falls below its limit, and may again once all have risen to 1.2 times theirs.
    The limits are shares of the run's own figures, so they fit any model and data:

    - feature_std below `health.least_std` of the highest one so far;
    - RankMe - 1 below `health.least_rank` of the first one: features on one line have a RankMe of 1;
    - feature_std below `health.least_std_ever`, whatever it was.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config
        self.first: dict[str, float] = {}  # of the run
        self.highest_std = 0.0
        self.is_on = False

    def judge(self, figures: Mapping[str, float], done: int) -> str | None:
        """Returns the alarm's text if it goes off after `done` steps. The first call sets what is compared with."""
        if not self.first:
            self.first = dict(figures)
        self.highest_std = max(self.highest_std, figures["feature_std"])
        signs = self._signs(figures)
        low = [sign for sign in signs if not sign.value >= sign.limit]  # NaN is low too
        if self.is_on or not low:
            self.is_on = self.is_on and any(not sign.value >= _CLEARED * sign.limit for sign in signs)
            return None
        self.is_on = True
        return f"step {done}: features are collapsing: {'; '.join(sign.text for sign in low)}. {self._advice(figures)}"

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, so that a run that goes on raises the same alarms."""
        return {"first": self.first, "highest_std": self.highest_std, "is_on": self.is_on}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.first, self.is_on = dict(state["first"]), bool(state["is_on"])
        self.highest_std = float(state["highest_std"])

    def _signs(self, figures: Mapping[str, float]) -> list[_Sign]:
        section, first = self._config.health, self.first
        std, rank = figures["feature_std"], figures["rank_me"]
        return [
            _Sign(
                text=f"feature_std is {std:.2g}, the alarm is below {section.least_std_ever:g}: features hardly depend "
                "on the image",
                value=std,
                limit=section.least_std_ever,
            ),
            _Sign(
                text=f"feature_std fell from {self.highest_std:.2g} to {std:.2g}, the alarm is below "
                f"{section.least_std:.0%} of the highest",
                value=std,
                limit=section.least_std * self.highest_std,
            ),
            _Sign(
                text=f"RankMe fell from {first['rank_me']:.3g} to {rank:.3g}, the alarm is below "
                f"{1 + section.least_rank * (first['rank_me'] - 1):.3g}",
                value=rank - 1,
                limit=section.least_rank * (first["rank_me"] - 1),
            ),
        ]

    def _advice(self, figures: Mapping[str, float]) -> str:
        """Returns what to change, with the settings' values."""
        if figures == self.first:
            return (
                "This is the first measurement, so look at the images first: masks.png, data.train, augment.mean and "
                "augment.std"
            )
        config = self._config
        momentum = config.schedule.momentum[0]
        slower = "schedule.momentum=[0.996,1.0]" if momentum < 0.996 else "a schedule.momentum nearer to 1"
        return (
            f"Set {slower} (it starts at {momentum:g}) or a lower optimizer.lr (it is {config.optimizer.lr:g}, after "
            f"{config.schedule.warmup_epochs:g} epochs of warm-up), go back to a checkpoint from before, and look at "
            "the images in masks.png"
        )

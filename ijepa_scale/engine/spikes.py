"""Judges losses and gradient norms against their running medians. Knows neither devices nor processes.

The medians at a step are of the steps before it, which every engine knows before it lets the step change anything. So
all engines and processes decide alike, and a run that goes on from a checkpoint decides as one that never stopped.
"""

from __future__ import annotations

import logging
import math
import statistics
import struct
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from ijepa_scale.config.spikes import LEAST_WINDOW, SpikesConfig
from ijepa_scale.errors import SpikeError

logger = logging.getLogger(__name__)

REMEDY = "lower optimizer.lr, or set a longer warm-up or optimizer.clip_norm"


class Limits(NamedTuple):
    """Above one of them a step has a spike. Both are fp32 numbers, so the device and the host compare alike."""

    loss: float = math.inf
    norm: float = math.inf


class SpikeJudge:
    """Decides what becomes of each step by the settings of the section `spikes`."""

    def __init__(self, config: SpikesConfig, *, run: str = "RUN", log: bool = True) -> None:
        """`run` is the run's folder, for messages, and `log` whether this process writes them."""
        self.config = config
        self.skipped = 0  # steps so far that aren't part of the state: left out, or gone back over
        self.roll_back: int | None = None  # the step whose spike asks for going back to a checkpoint
        self.found = ""  # that spike, in words
        self._run, self._log = run, log
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._spikes = self._nonfinite = 0  # in a row
        self._returns: tuple[int | None, int] = (None, 0)  # the checkpoint that was last gone back to, and how often
        self._told: int | None = None  # the step of the last line
        self._untold = 0

    @property
    def needs_norm_first(self) -> bool:
        """Whether it needs the gradient norm before a step is taken, since it may leave it out."""
        return self.config.prevents or self.config.skip_nonfinite > 0

    def limits(self) -> Limits:
        """Returns the limits for the next step, infinite while there are too few values."""
        if self.config.action == "none" or len(self._losses) < LEAST_WINDOW:
            return Limits()
        norm = _limit(self._norms, self.config.norm_factor) if self._norms else math.inf
        return Limits(_limit(self._losses, self.config.loss_factor), norm)

    def forgives(self, step: int, what: str) -> bool:
        """Returns whether a step with a value that isn't finite, which changed nothing, is left out."""
        self._nonfinite += 1
        if self._nonfinite > self.config.skip_nonfinite:
            return False
        self.skipped += 1
        self._tell(step, f"{what}, so it changed nothing (spikes.skip_nonfinite={self.config.skip_nonfinite})")
        return True

    def see(self, step: int, loss: float, norm: float | None, limits: Limits) -> bool:
        """Takes the finite values of a step and the limits it had. Returns whether the step was left out.

        Raises:
            SpikeError: it ends the run. The step changed nothing.
        """
        self._nonfinite = 0
        text = self._spike(step, loss, norm, limits)
        if text is None or not self.config.prevents:
            self._losses.append(loss)
            if norm is not None:
                self._norms.append(norm)
            if text is None:
                self._spikes = 0
            else:
                self._tell(step, f"{text}; it was taken (spikes.action=warn)")
            return False
        self._spikes += 1
        action, most = self.config.action, self.config.most
        if action == "stop" or self._spikes >= most:
            row = "" if action == "stop" else f", the last of {self._spikes} in a row (spikes.most)"
            raise SpikeError(f"{text}{row}. {self.nothing_moved(step)}", step)
        if action == "rollback":
            self.roll_back, self.found = step, text
            return True
        self.skipped += 1
        self._tell(step, f"{text}; it changed nothing (spikes.action=skip)")
        return True

    def see_norm(self, step: int, norm: float) -> None:
        """Takes the gradient norm of a step that was taken, where it is known only afterwards (`see` without it)."""
        text = self._spike(step, None, norm, self.limits())
        self._norms.append(norm)
        if text is not None:
            self._tell(step, f"{text}; it was taken (spikes.action=warn)")

    def rolled_back(self, to: int | None, *, skipped: int = 0) -> None:
        """Call to answer the spike of `roll_back` by going back to the checkpoint of step `to`, before it is loaded.

        `skipped` are the steps that the checkpoint leaves out. Without a checkpoint (None) only the spike is left out.

        Raises:
            SpikeError: the run has gone back there too often.
        """
        assert self.roll_back is not None
        step, self.roll_back = self.roll_back, None
        self._returns = (to, self._returns[1] + 1 if to == self._returns[0] else 1)
        if self._returns[1] >= self.config.most:
            raise SpikeError(
                f"step {step}: spikes have led back to the checkpoint of step {to} {self._returns[1]} times "
                f"(spikes.most). {self.nothing_moved(step)}",
                step,
            )
        self.skipped = self.skipped + 1 if to is None else skipped + step + 1 - to

    def row(self) -> dict[str, float | int | None]:
        """Returns what the row of a run says of it."""
        return {"steps_skipped": self.skipped} if self.skipped else {}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores."""
        return {
            "losses": [*self._losses],
            "norms": [*self._norms],
            "spikes": self._spikes,
            "nonfinite": self._nonfinite,
            "returns": [*self._returns],
            "skipped": self.skipped,
        }

    def load_state(self, state: Mapping[str, Any], *, returning: bool = False) -> None:
        """Restores what `state` returned; when `returning` to a checkpoint, only the values of the steps before it."""
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._norms = deque(state["norms"], maxlen=self.config.window)
        if not returning:
            self._spikes, self._nonfinite, self.skipped = state["spikes"], state["nonfinite"], state["skipped"]
            self._returns = (state["returns"][0], state["returns"][1])

    def nothing_moved(self, step: int, remedy: str = f"{REMEDY}, or spikes.action=skip") -> str:
        """Returns what to know and to do about a step that ended the run."""
        return (
            "Weights, optimiser, target and schedule are as before this step (if the run took a step, it saves them in "
            f"`stopped`); look at its images with python launch/replay.py {self._run} --step {step}, and resume from "
            f"the last checkpoint after a change: {remedy}"
        )

    def _spike(self, step: int, loss: float | None, norm: float | None, limits: Limits) -> str | None:
        for name, value, limit, factor, values in (
            ("loss", loss, limits.loss, f"loss_factor={self.config.loss_factor:g}", self._losses),
            ("gradient norm", norm, limits.norm, f"norm_factor={self.config.norm_factor:g}", self._norms),
        ):
            if value is not None and value > limit:
                median = statistics.median(values)
                times = f"{value / median:.3g} times " if median > 0 else "above "
                return f"step {step}: {name} {value:.4g} is {times}the running median {median:.4g} (spikes.{factor})"
        return None

    def _tell(self, step: int, text: str) -> None:
        """Writes a line, at most one in as many steps as the window has; the next one counts those left out."""
        if self._told is not None and step - self._told < self.config.window:
            self._untold += 1
            return
        more = f"; {self._untold} more since step {self._told}" if self._untold else ""
        self._told, self._untold = step, 0
        if self._log:
            logger.warning(
                "%s%s. python launch/replay.py %s --step %d shows its batch; if there are more, %s",
                text, more, self._run, step, REMEDY,
            )  # fmt: skip


def _limit(values: deque[float], factor: float) -> float:
    """Returns the fp32 number that a value must exceed to be a spike; a median below 0 counts by its size."""
    median = statistics.median(values)
    try:
        return struct.unpack("f", struct.pack("f", median + (factor - 1) * abs(median)))[0]
    except OverflowError:
        return math.inf

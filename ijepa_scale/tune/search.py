"""Searches for the fastest settings in stages, so that it ends within minutes.

The stages are micro-batch and checkpointing, then compilation and attention, then the spread over processes, and last
the fastest candidates once more in reverse order. `probe` measures one candidate and may fail in any way. Knows
nothing of processes or models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ijepa_scale.config import EngineConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.plurals import counted
from ijepa_scale.tune.children import Outcome
from ijepa_scale.tune.ranking import Measurement, is_faster, ranked, winner
from ijepa_scale.tune.space import CHECKPOINTING, Candidate, Space

SKIPPABLE = ("compile", "attention", "spreads", "finals")
FINALISTS = 3
_CLOSE = 0.5  # of the best rate: candidates that are slower, beyond the spread, don't reach the finals
_LEAST_S = 5.0  # no child is started with less time left

Probe = Callable[[Candidate, float], Outcome]  # called with the seconds that it may take


@dataclass
class Found:
    """The results of the search so far."""

    measured: dict[Candidate, Measurement] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # label -> reason
    left_out: dict[str, str] = field(default_factory=dict)  # label -> reason


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of a search."""

    seconds: float  # for the whole search
    candidate_seconds: float  # for one candidate
    candidates: int  # to start at most, including the finals
    skip: tuple[str, ...] = ()  # stages of SKIPPABLE to skip


class Search:
    """Measures the candidates of a space; `found` holds the results at any time, even after an interruption."""

    def __init__(
        self,
        space: Space,
        probe: Probe,
        budget: Budget,
        *,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found = Found()
        self._space, self._probe, self._budget = space, probe, budget
        self._say, self._clock = say, clock
        self._begin = clock()
        self._started = 0

    @property
    def seconds_left(self) -> float:
        """The seconds left in the budget."""
        return self._budget.seconds - (self._clock() - self._begin)

    @property
    def winner(self) -> Measurement | None:
        """The winner so far."""
        measured = list(self.found.measured.values())
        return winner(measured, self._space.config.engine) if measured else None

    def run(self) -> None:
        """Runs all stages."""
        self._batches(self._space.engine)
        stages = {
            "compile": self._compilation,
            "attention": self._attention,
            "spreads": self._spreads,
            "finals": self._finals,
        }
        for name, stage in stages.items():
            if name in self._budget.skip:
                self._leave_out(f"stage {name}", "--skip")
            else:
                stage()

    def _batches(self, engine: EngineConfig) -> None:
        """Tries micro-batches of the engine as configured, the largest first, with more and more recomputation."""
        largest = 0  # that ran with less recomputation: for smaller ones, recomputing only costs time
        for mode in CHECKPOINTING:
            best: Measurement | None = None
            sizes = [size for size in self._space.micro_batches() if size > largest]
            if not sizes:
                self._leave_out(
                    f"checkpointing {mode}", f"{counted(largest, 'image')}, all of a step, fit at once with less"
                )
            for size in sizes:
                candidate = self._space.candidate(engine, size, checkpointing=mode)
                found, kind = self._measure(candidate)
                if kind in ("refused", "error") or (kind == "left out" and self._stopped()):
                    break  # the size isn't the reason
                if found is None:
                    continue
                largest = max(largest, size)
                if best is not None and not is_faster(found, best):
                    break  # smaller ones are unlikely to be faster
                best = found

    def _compilation(self) -> None:
        """Tries the fastest candidate so far compiled, or eager if the configuration compiles."""
        best, problem = self.winner, self._space.machine.compile_problem
        if best is not None and not best.candidate.engine.compile and problem is not None:
            self._leave_out("compile True", problem)
        elif best is not None:
            self._vary(best.candidate, compile=not best.candidate.engine.compile)

    def _attention(self) -> None:
        """Tries other attention kernels with the fastest candidate so far."""
        best = self.winner
        if best is None:
            return
        configured = best.candidate.engine.attention
        for name, same in self._space.attentions(best.attention, configured):
            if same is None:
                self._vary(best.candidate, attention=name)
            else:
                self._leave_out(f"attention {name}", same)

    def _spreads(self) -> None:
        """Tries other ways to spread the step: with the best settings so far, and with the least recomputation."""
        best = self.winner
        base = best.candidate if best else self._space.candidate(self._space.engine, 1, checkpointing="full")
        for name, settings in self._space.spreads(base.engine):
            if isinstance(settings, str):
                self._leave_out(name, settings)
                continue
            if name == base.spread:
                continue
            if best is not None:
                self._vary(base, **settings)
            if best is None or base.engine.checkpointing != "none" or base.engine.accumulation > 1:
                self._least_recomputation(base.engine, settings)

    def _least_recomputation(self, engine: EngineConfig, settings: dict[str, Any]) -> None:
        """Tries the least checkpointing, with the largest micro-batch, that fits by the plan."""
        for mode in CHECKPOINTING:
            for size in self._space.micro_batches():
                try:
                    candidate = self._space.candidate(engine, size, checkpointing=mode, **settings)
                except ConfigError:
                    return  # `_vary` has already reported it
                if self._space.needed(candidate) <= self._space.machine.room:
                    self._measure(candidate)
                    return

    def _finals(self) -> None:
        """Measures the fastest once more in reverse order, so that none profits from the time it was measured at."""
        order = ranked(list(self.found.measured.values()))[:FINALISTS]
        close = [each for each in order if each.rates[1] >= _CLOSE * order[0].rates[1] or not is_faster(order[0], each)]
        for first in reversed(close if len(close) > 1 else []):
            label = first.candidate.label
            stopped = self._stopped()
            if stopped is not None:
                self._say(f"not measured once more: {label}: {stopped}")
                continue
            again, _ = self._start(first.candidate)
            if again is None:
                del self.found.measured[first.candidate]  # a candidate that fails the second time can't win
            else:
                self.found.measured[first.candidate] = first.with_more(again)

    def _vary(self, base: Candidate, **changes: Any) -> None:
        """Tries a candidate after changing some settings."""
        try:
            candidate = self._space.candidate(base.engine, base.micro_batch, **changes)
        except ConfigError as error:
            what = ", ".join(f"{name} {value}" for name, value in changes.items() if value is not None)
            self._leave_out(what, str(error).splitlines()[0])
            return
        self._measure(candidate)

    def _measure(self, candidate: Candidate) -> tuple[Measurement | None, str]:
        """Measures a candidate unless it is left out or known; returns the measurement and the kind of outcome."""
        known = self.found.measured.get(candidate)
        if known is not None:
            return known, "done"
        reason = self._space.planned_out(candidate) or self._stopped()
        if reason is not None:
            self._leave_out(candidate.label, reason)
            return None, "left out"
        found, kind = self._start(candidate)
        if found is not None:
            self.found.measured[candidate] = found
        return found, kind

    def _start(self, candidate: Candidate) -> tuple[Measurement | None, str]:
        self._started += 1
        outcome = self._probe(candidate, min(self._budget.candidate_seconds, self.seconds_left))
        if outcome.kind != "done":
            self._fail(candidate.label, outcome.reason)
            return None, outcome.kind
        found = Measurement.of(candidate, self._space.batch_size, outcome.values)
        machine = self._space.machine
        if found.worst_bytes > machine.room:
            self._fail(
                candidate.label,
                f"takes {found.worst_bytes / 1e9:.2f} GB with the longest masks ({found.peak_bytes / 1e9:.2f} GB with "
                f"drawn ones) of {machine.room / 1e9:.2f} GB that a process may take",
            )
            return None, "memory"
        low, middle, high = found.rates
        self._say(
            f"[{self._started}] {candidate.label}: {middle:.1f} images/s ({low:.1f} to {high:.1f}), "
            f"{found.worst_bytes / 1e9:.2f} GB, {outcome.seconds:.0f} s"
        )
        return found, "done"

    def _stopped(self) -> str | None:
        """Returns why no more candidates may be started; None if they may."""
        if self._started >= self._budget.candidates:
            return f"--limit {self._budget.candidates} is reached"
        if self.seconds_left < _LEAST_S:
            return f"--minutes {self._budget.seconds / 60:g} are over"
        return None

    def _fail(self, label: str, reason: str) -> None:
        self.found.failed[label] = reason
        self._say(f"[{self._started}] {label}: failed: {reason}")

    def _leave_out(self, label: str, reason: str) -> None:
        self.found.left_out.setdefault(label, reason)

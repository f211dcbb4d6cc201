"""Finds the number of worker processes that keeps the step from waiting, with the loader measured by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ijepa_scale.tune.children import Outcome

HEADROOM = 1.1  # a loader must be this much faster than the step: its rate varies, and the step uses cores too

Measure = Callable[[int], Outcome]  # measures a loader with the given number of workers


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The measured loaders, and the chosen number of workers."""

    need: float = 0.0  # images/s of all processes: the winner's rate
    rates: dict[int, float] = field(default_factory=dict)  # workers per process -> images/s of all processes
    failed: dict[int, str] = field(default_factory=dict)  # workers per process -> reason
    chosen: int | None = None  # None if none were measured
    reason: str = ""  # why none were measured

    @property
    def keeps_up(self) -> bool:
        """Whether the chosen number is as fast as the step needs, with the headroom."""
        return self.chosen is not None and self.rates[self.chosen] >= HEADROOM * self.need


def counts(configured: int, cores: int, processes: int) -> list[int]:
    """Returns the numbers of workers to try, ascending: powers of two up to a process's share of the cores."""
    most = max(1, cores // processes)
    powers = [1 << exponent for exponent in range(most.bit_length())]
    return sorted({*powers, most, max(1, configured)})


def choose_workers(tried: list[int], need: float, processes: int, measure: Measure) -> Workers:
    """Chooses the fewest workers whose loader is fast enough, or else the fastest; stops at the first fast enough."""
    rates: dict[int, float] = {}
    failed: dict[int, str] = {}
    for count in tried:
        outcome = measure(count)
        if outcome.kind == "refused":
            return Workers(need=need, reason=outcome.reason)
        if outcome.kind != "done":
            failed[count] = outcome.reason
            continue
        rates[count] = processes * min(each["images_per_s"] for each in outcome.values)
        if rates[count] >= HEADROOM * need:
            break
    if not rates:
        return Workers(need=need, failed=failed, reason="; ".join(dict.fromkeys(failed.values())))
    enough = [count for count in rates if rates[count] >= HEADROOM * need]
    chosen = enough[0] if enough else max(rates, key=lambda count: rates[count])
    return Workers(need=need, rates=rates, failed=failed, chosen=chosen)

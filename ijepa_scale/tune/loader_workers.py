"""How many decoding processes keep the step from waiting, measured apart from the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ijepa_scale.tune.children import Outcome

HEADROOM = 1.1  # a loader this much faster than the step: its rate sways, and the step takes cores too

Measure = Callable[[int], Outcome]  # a loader with that many workers


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Loaders that were measured, and the number of workers to take."""

    need: float = 0.0  # images/s of all processes, the winner's rate
    rates: dict[int, float] = field(default_factory=dict)  # workers of each process -> images/s of all processes
    failed: dict[int, str] = field(default_factory=dict)
    chosen: int | None = None  # None: they weren't measured
    reason: str = ""  # why not

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
    """Returns the fewest workers whose loader is fast enough, else the fastest. Stops at the first that is."""
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

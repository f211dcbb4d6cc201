"""Finding the fewest workers that keep the step from waiting."""

from __future__ import annotations

from ijepa_scale.tune.children import Outcome
from ijepa_scale.tune.loader_workers import Workers, choose_workers, counts
from ijepa_scale.tune.report import workers_text


def loaders(*rates: float) -> Outcome:
    return Outcome(values=tuple({"images_per_s": rate} for rate in rates))


def test_counts_are_powers_of_two_up_to_a_share_of_the_cores() -> None:
    assert counts(2, cores=12, processes=1) == [1, 2, 4, 8, 12]
    assert counts(6, cores=16, processes=4) == [1, 2, 4, 6]
    assert counts(0, cores=2, processes=4) == [1]


def test_the_fewest_that_are_enough_win() -> None:
    asked: list[int] = []

    def measure(count: int) -> Outcome:
        asked.append(count)
        return loaders(60.0 * count, 50.0 * count)  # the slower of the two processes counts

    found = choose_workers([1, 2, 4, 8], 180.0, 2, measure)
    assert asked == [1, 2] and found.chosen == 2 and found.keeps_up and found.rates == {1: 100.0, 2: 200.0}
    assert "    2 per process: 200.0 images/s <- chosen" in workers_text(found)


def test_the_fastest_is_chosen_if_none_is_enough() -> None:
    found = choose_workers([1, 2, 4], 1000.0, 1, lambda count: loaders({1: 100.0, 2: 180.0, 4: 170.0}[count]))
    assert found.chosen == 2 and not found.keeps_up
    assert "none is enough: the step will wait for data" in workers_text(found)


def test_failures_are_reported() -> None:
    outcomes = {1: Outcome(kind="time", reason="took longer than 9 s"), 2: loaders(50.0)}
    found = choose_workers([1, 2], 10.0, 1, lambda count: outcomes[count])
    assert found.chosen == 2 and "    1 per process: took longer than 9 s" in workers_text(found)
    none = choose_workers([1], 10.0, 1, lambda count: outcomes[count])
    assert none.chosen is None and workers_text(none) == "workers not measured: took longer than 9 s"
    refused = choose_workers([1, 2], 10.0, 1, lambda count: Outcome(kind="refused", reason="no such folder"))
    assert refused == Workers(need=10.0, reason="no such folder")

"""Bad steps stop at once if the host reads the result; otherwise the device stops and the host raises a step later."""

from __future__ import annotations

import pytest
import torch

from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.world import World
from ijepa_scale.errors import NonFiniteError

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
NAN, GOOD = torch.tensor(float("nan")), torch.tensor(1.0)


def test_take_returns_the_mean_and_clears_the_losses() -> None:
    watch = FiniteWatch(WORLD)
    for value in (1.0, 4.0):
        watch.record(torch.tensor(value, dtype=torch.float64))
    assert watch.take() == torch.tensor(2.5)
    watch.record(torch.tensor(7.0))
    assert watch.take() == torch.tensor(7.0)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((NAN, GOOD), "step 3: process 0 has loss nan"), ((GOOD, NAN.abs() / 0), "step 3: the gradient norm is nan")],
)
def test_without_late_it_raises_before_anything_changes(numbers, text) -> None:
    watch = FiniteWatch(WORLD)
    assert watch.check(2, GOOD, GOOD) is None
    with pytest.raises(NonFiniteError, match=text) as caught:
        watch.check(3, *numbers)
    assert caught.value.step == 3
    watch.settle()


@pytest.mark.parametrize("how", ["settle", "check"])
def test_late_stops_the_device_at_once_and_raises_a_step_later(how) -> None:
    watch = FiniteWatch(WORLD, late=True)
    for step in (0, 1):
        assert watch.check(step, GOOD, GOOD) == 0.0
    assert watch.check(2, GOOD, NAN) == 1.0  # exactly 1: fused kernels stop at this value
    with pytest.raises(NonFiniteError, match="step 2: the gradient norm is nan on processes") as caught:
        watch.settle() if how == "settle" else watch.check(3, GOOD, GOOD)
    assert caught.value.step == 2


def test_late_raises_at_every_later_call() -> None:
    """The device stays stopped, so later steps change nothing and must not look successful."""
    watch = FiniteWatch(WORLD, late=True)
    watch.check(2, NAN, GOOD)
    for again in (watch.settle, lambda: watch.check(3, GOOD, GOOD), lambda: watch.check(4, NAN, GOOD), watch.settle):
        with pytest.raises(NonFiniteError, match="step 2: process 0 has loss nan") as caught:
            again()
        assert caught.value.step == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_request_to_stop_travels_with_the_check(late, monkeypatch) -> None:
    """With `late` it is known one step later; it is no bad value, and doesn't hide one."""
    watch = FiniteWatch(WORLD, late=late)
    watch.check(0, GOOD, GOOD)
    monkeypatch.setattr("ijepa_scale.stopping.reason", lambda: "SIGTERM")
    watch.check(1, GOOD, GOOD)
    assert watch.leaving is not late
    watch.settle()
    assert watch.leaving
    watch = FiniteWatch(WORLD, late=late)
    with pytest.raises(NonFiniteError, match="step 2: the gradient norm is nan"):
        watch.check(2, GOOD, NAN)
        watch.settle()

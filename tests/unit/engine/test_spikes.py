"""Spikes are judged by the median of the steps before, alike on the host and on the device, and after a resume."""

from __future__ import annotations

import json
import logging
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config.spikes import LEAST_WINDOW, SpikesConfig
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.errors import NonFiniteError, SpikeError

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
NAN = float("nan")
VALUES = st.lists(st.tuples(st.floats(0.25, 8.0, width=32), st.floats(0.25, 8.0, width=32)), min_size=30, max_size=60)
ACTIONS = st.sampled_from(["none", "warn", "skip"])


def judged(config: SpikesConfig, values: list[tuple[float, float]], *, late: bool = False) -> list[int]:
    """Returns the steps whose flag keeps them from changing anything."""
    watch, stopped = FiniteWatch(WORLD, late=late), []
    watch.judge = SpikeJudge(config, log=False)
    for step, (loss, norm) in enumerate(values):
        flag = watch.check(step, torch.tensor(loss), torch.tensor(norm))
        assert watch.left_out == (flag is not None and not late)
        if flag is not None and flag != 0:
            assert flag == 1  # exactly: fused kernels stop at this value
            stopped.append(step)
    watch.settle()
    assert watch.judge.skipped == len(stopped)
    return stopped


@given(VALUES, ACTIONS)
def test_a_step_is_left_out_if_it_is_above_a_limit(values: list[tuple[float, float]], action: str) -> None:
    config = SpikesConfig(action=action, window=25, loss_factor=1.5, norm_factor=2.0, most=1000)
    expected: list[int] = []
    kept: list[tuple[float, float]] = []
    for step, value in enumerate(values):
        window = kept[-25:]
        medians = [statistics.median(each) for each in zip(*window, strict=True)]
        high = len(window) >= LEAST_WINDOW and (
            value[0] > np.float32(1.5 * medians[0]) or value[1] > np.float32(2 * medians[1])
        )
        if high and action == "skip":
            expected.append(step)
        else:
            kept.append(value)
    assert judged(config, values) == judged(config, values, late=True) == expected


@given(VALUES, st.integers(0, 29), st.sampled_from(["skip", "warn"]))
def test_a_resumed_judge_decides_as_one_that_went_on(values: list[tuple[float, float]], stop: int, action: str) -> None:
    judge = SpikeJudge(SpikesConfig(action=action, window=20, loss_factor=1.2, norm_factor=1.3, most=1000), log=False)
    resumed = SpikeJudge(judge.config, log=False)
    for step, (loss, norm) in enumerate(values):
        if step == stop:
            resumed.load_state(json.loads(json.dumps(judge.state())))
        left = judge.see(step, loss, norm, judge.limits())
        if step >= stop:
            assert resumed.see(step, loss, norm, resumed.limits()) == left
    assert resumed.state() == judge.state()


@given(st.lists(st.floats(-4, -1, width=32), min_size=20, max_size=20))
def test_losses_below_0_count_by_their_size(losses: list[float]) -> None:
    judge = SpikeJudge(SpikesConfig(loss_factor=3.0), log=False)
    for step, loss in enumerate(losses):
        judge.see(step, loss, None, judge.limits())
    assert judge.limits().loss == pytest.approx(statistics.median(losses) * -1, rel=1e-6)
    assert judge.limits().norm == float("inf")


def test_a_huge_median_has_no_limit() -> None:
    judge = SpikeJudge(SpikesConfig(), log=False)
    for step in range(20):
        judge.see(step, 3e38, 1.0, judge.limits())
    assert judge.limits() == (float("inf"), 10.0)


@pytest.mark.parametrize("late", [False, True])
def test_nonfinite_steps_in_a_row_are_forgiven_up_to_a_number(late: bool) -> None:
    watch = FiniteWatch(WORLD, late=late)
    watch.judge = SpikeJudge(SpikesConfig(action="none", skip_nonfinite=2), log=False)
    good, bad = torch.tensor(1.0), torch.tensor(NAN)
    for step, (loss, norm) in enumerate([(bad, good), (good, bad), (good, good), (bad, bad), (good, bad)]):
        flag = watch.check(step, loss, norm)
        assert (flag is not None and flag == 1) == (step != 2)
    watch.settle()
    assert watch.judge.skipped == 4
    with pytest.raises(NonFiniteError, match="step 5: process 0 has loss nan") as caught:
        watch.check(5, bad, good)
        watch.settle()
    assert caught.value.step == 5


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("action", "end"), [("stop", 21), ("skip", 23), ("rollback", 23)])
def test_the_run_ends(action: str, end: int, late: bool) -> None:
    watch = FiniteWatch(WORLD, late=late)
    watch.judge = SpikeJudge(SpikesConfig(action=action, most=3), run="runs/mine", log=False)
    one = torch.tensor(1.0)
    for step in range(21):
        watch.check(step, one, one)
    with pytest.raises(SpikeError, match=f"step {end}: loss 3.5 is 3.5 times the running median 1 ") as caught:
        for step in range(21, 25):
            watch.check(step, 3.5 * one, one)
            watch.settle()
            if watch.judge.roll_back is not None:
                watch.judge.rolled_back(10 * step)
    assert caught.value.step == end and f"python launch/replay.py runs/mine --step {end}," in str(caught.value)
    if late:
        with pytest.raises(SpikeError, match=f"step {end}: "):
            watch.settle()  # at every later call: later steps must not look successful


def test_a_late_step_after_a_spike_changes_nothing_before_the_run_goes_back() -> None:
    watch = FiniteWatch(WORLD, late=True)
    watch.judge = SpikeJudge(SpikesConfig(action="rollback"), log=False)
    one = torch.tensor(1.0)
    for step in range(20):
        watch.check(step, one, one)
    assert watch.check(20, one, 11 * one) == 1 and not watch.left_out
    assert watch.check(21, one, one) == 1 and watch.left_out and watch.judge.roll_back == 20
    watch.judge.rolled_back(16, skipped=2)
    assert watch.judge.skipped == 2 + 5  # of steps 16 to 20
    assert watch.check(21, one, one) == 0 and not watch.left_out


def test_lines_are_few_and_count_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    judge = SpikeJudge(SpikesConfig(window=20))
    for step in range(60):
        judge.see(step, 9.0 if step in (20, 25, 33, 47) else 1.0, 1.0, judge.limits())
    assert [text.split(":")[0] for text in caplog.messages] == ["step 20", "step 47"]
    assert "loss 9 is 9 times the running median 1 (spikes.loss_factor=3); it was taken" in caplog.messages[0]
    assert "; 2 more since step 20. python launch/replay.py RUN --step 47 shows" in caplog.messages[1]
    quiet = SpikeJudge(SpikesConfig(window=20), log=False)
    for step in range(30):
        quiet.see(step, 9.0 if step == 20 else 1.0, 1.0, quiet.limits())
    assert len(caplog.messages) == 2

"""The alarm goes off once for each collapse, says what to change, and survives a checkpoint."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.health import HealthConfig
from ijepa_scale.evaluate.alarms import CollapseAlarm

CONFIG = PretrainConfig(health=HealthConfig(least_std=0.5, least_rank=0.4, least_std_ever=0.02))
START = {"feature_std": 0.4, "rank_me": 6.0}


def started(config: PretrainConfig = CONFIG) -> CollapseAlarm:
    alarm = CollapseAlarm(config)
    assert alarm.judge(START, 0) is None
    return alarm


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {"feature_std": 0.19, "rank_me": 6.0},
            "feature_std fell from 0.4 to 0.19, the alarm is below 50% of the highest",
        ),
        ({"feature_std": 0.4, "rank_me": 2.9}, "RankMe fell from 6 to 2.9, the alarm is below 3."),
        ({"feature_std": float("nan"), "rank_me": 6.0}, "feature_std is nan"),
    ],
)
def test_each_sign_alone_raises_the_alarm(figures: dict[str, float], said: str) -> None:
    text = started().judge(figures, 300)
    assert text is not None and text.startswith("step 300: features are collapsing: ") and said in text
    assert "a schedule.momentum nearer to 1 (it starts at 0.996)" in text
    assert "a lower optimizer.lr (it is 0.001, after 40 epochs of warm-up)" in text


def test_a_low_momentum_is_named_first() -> None:
    config = CONFIG.replace(schedule=CONFIG.schedule.replace(momentum=(0.0, 0.0)))
    text = started(config).judge({"feature_std": 0.1, "rank_me": 1.1}, 100)
    assert text is not None and "Set schedule.momentum=[0.996,1.0] (it starts at 0)" in text


def test_images_that_are_alike_are_told_before_the_first_step() -> None:
    text = CollapseAlarm(CONFIG).judge({"feature_std": 1e-7, "rank_me": 1.0}, 0)
    assert text is not None and "feature_std is 1e-07, the alarm is below 0.02" in text
    assert "masks.png, data.train, augment.mean and augment.std" in text and "momentum" not in text


def test_the_second_alarm_waits_until_the_figures_have_risen_well_above_their_limits() -> None:
    alarm = started()
    stds = [0.19, 0.1, 0.21, 0.19, 0.23, 0.19, 0.25, 0.19]  # the limit is 0.2, and 0.24 ends an episode
    raised = [alarm.judge({"feature_std": std, "rank_me": 6.0}, step) is not None for step, std in enumerate(stds)]
    assert raised == [True, False, False, False, False, False, False, True]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 12)), max_size=30), st.integers(0, 30))
def test_a_run_that_goes_on_raises_the_same_alarms(figures: list[tuple[float, float]], stop: int) -> None:
    rows = [{"feature_std": std, "rank_me": rank} for std, rank in figures]
    whole, broken = CollapseAlarm(CONFIG), CollapseAlarm(CONFIG)
    expected = [whole.judge(row, step) for step, row in enumerate(rows)]
    found = [broken.judge(row, step) for step, row in enumerate(rows[:stop])]
    again = CollapseAlarm(CONFIG)
    again.load_state(json.loads(json.dumps(broken.state())))
    assert expected == found + [again.judge(row, step + len(found)) for step, row in enumerate(rows[stop:])]


@given(st.lists(st.floats(0.201, 5), min_size=1), st.lists(st.floats(3.01, 100), min_size=1))
def test_figures_above_the_limits_raise_none(stds: list[float], ranks: list[float]) -> None:
    alarm = started()
    assert not any(alarm.judge({"feature_std": s, "rank_me": r}, 1) for s, r in zip(sorted(stds), ranks, strict=False))


def test_features_that_spread_first_are_compared_with_their_widest() -> None:
    alarm = started()
    assert alarm.judge({"feature_std": 0.8, "rank_me": 6.0}, 10) is None
    text = alarm.judge({"feature_std": 0.39, "rank_me": 6.0}, 20)
    assert text is not None and "feature_std fell from 0.8 to 0.39" in text

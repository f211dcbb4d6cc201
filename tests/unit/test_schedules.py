import math

import pytest

from ijepa_scale.schedules import Schedule

PUBLISHED = dict(
    steps_per_epoch=625,
    epochs=300,
    warmup_epochs=40,
    ipe_scale=1.0,
    start_lr=2e-4,
    lr=1e-3,
    final_lr=1e-6,
    weight_decay=0.04,
    final_weight_decay=0.4,
    momentum=(0.996, 1.0),
)


def schedule(**changes):
    return Schedule(**{**PUBLISHED, **changes})


# The published H/14 run: 25 000 steps of warm-up, 187 500 in all.
@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 2.00032e-4),
        (12_499, 6e-4),
        (24_998, 9.99968e-4),
        (24_999, 1e-3),
        (65_624, 8.5369983708e-4),  # a quarter of the cosine: 1e-6 + 9.99e-4 * 0.8535533906
        (106_249, 5.005e-4),
        (146_874, 1.4730016292e-4),
        (187_499, 1e-6),
    ],
)
def test_learning_rate_of_the_published_run(step, lr):
    assert schedule()(step).lr == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "weight_decay"), [(46_874, 0.0927207794), (93_749, 0.22), (140_624, 0.3472792206), (187_499, 0.4)]
)
def test_weight_decay_of_the_published_run(step, weight_decay):
    assert schedule()(step).weight_decay == pytest.approx(weight_decay, rel=1e-9)


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.996), (1, 0.99600002133333), (93_750, 0.998), (187_500, 1.0)])
def test_momentum_counts_from_0(step, momentum):
    assert schedule()(step).momentum == pytest.approx(momentum, abs=1e-13)


def test_momentum_stays_below_its_end_until_the_run_is_over():
    assert schedule()(187_499).momentum < 1.0


def test_ipe_scale_stretches_the_curves_and_not_the_run():
    stretched = schedule(ipe_scale=1.25)
    assert stretched.total_steps == 187_500
    assert stretched(187_499).lr > 1e-5
    assert stretched(234_374).lr == pytest.approx(1e-6)  # 1.25 * 187 500 - 1
    assert stretched(234_374).weight_decay == pytest.approx(0.4)
    assert stretched(187_500).momentum == pytest.approx(0.996 + 0.004 / 1.25)


@pytest.mark.parametrize(("first", "final"), [(0.04, 0.4), (0.4, 0.04)])
def test_weight_decay_runs_to_its_end_in_either_direction(first, final):
    small = schedule(steps_per_epoch=7, epochs=3, warmup_epochs=1, weight_decay=first, final_weight_decay=final)
    values = [small(step).weight_decay for step in range(60)]  # far past the horizon of 21 steps
    cosine = [first + (final - first) * 0.5 * (1 - math.cos(math.pi * (step + 1) / 21)) for step in range(60)]
    assert values == pytest.approx(cosine, abs=1e-12)
    assert values[20] == final == (max(values) if first < final else min(values))
    assert all((after - before) * (final - first) > 0 for before, after in zip(values[:20], values[1:21], strict=True))


def test_constant_weight_decay_stays():
    assert {schedule(weight_decay=0.05, final_weight_decay=0.05)(step).weight_decay for step in range(60)} == {0.05}


def test_the_learning_rate_never_falls_below_its_end():
    low = schedule(steps_per_epoch=10, epochs=2, warmup_epochs=0, lr=1e-4, final_lr=1e-3)
    assert {low(step).lr for step in range(20)} == {1e-3}


def test_fractions_of_epochs_are_cut_to_whole_steps():
    small = schedule(steps_per_epoch=5, epochs=2.5, warmup_epochs=0.5, start_lr=0.0, lr=1.0, final_lr=0.0)
    assert small.total_steps == 12
    # Two steps of warm-up: 0.5, then the cosine over 10 from s = 2.
    got = [small(step).lr for step in range(4)]
    assert got == pytest.approx([0.5, 1.0, 0.9755282581, 0.9045084972])
    assert small(11).lr == pytest.approx(0.0, abs=1e-12)


def test_no_warm_up_starts_on_the_cosine():
    none = schedule(steps_per_epoch=10, epochs=1, warmup_epochs=0, lr=1.0, final_lr=0.0)
    assert none(0).lr == pytest.approx(0.9755282581)


def test_warm_up_as_long_as_the_run_ends_at_the_reference_rate():
    whole = schedule(steps_per_epoch=10, epochs=2, warmup_epochs=2)
    assert whole(18).lr == pytest.approx(9.6e-4)
    assert whole(19).lr == pytest.approx(1e-3)

"""Properties of the order of samples that must hold for any shards, batch, window and number of processes."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.data.order import SampleOrder
from ijepa_scale.errors import DataError

SETS = st.tuples(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 8),  # uneven, empty too
    st.integers(1, 8),  # batch
    st.integers(0, 3),  # seed
    st.integers(1, 14),  # window
)


@settings(max_examples=150, deadline=None)
@given(SETS)
def test_a_pass_delivers_each_sample_once_and_all_but_the_remainder(description):
    order = SampleOrder(*description)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        ids = np.concatenate([order.batch(step) for step in steps])
        assert len(ids) == order.num_samples - order.num_samples % order.batch_size
        assert len(set(ids.tolist())) == len(ids)
        assert ids.min() >= 0 and ids.max() < order.num_samples
        assert {order.epoch(step) for step in steps} == {epoch}


@settings(max_examples=60, deadline=None)
@given(SETS, st.randoms(use_true_random=False))
def test_random_access_equals_reading_in_turn(description, random):
    order = SampleOrder(*description)
    steps = list(range(3 * order.steps_per_epoch))
    in_turn = {step: order.batch(step) for step in steps}
    random.shuffle(steps)
    for step in steps:
        np.testing.assert_array_equal(SampleOrder(*description).batch(step), in_turn[step])
        np.testing.assert_array_equal(order.batch(step), in_turn[step])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 5))
def test_processes_share_one_global_batch_in_consecutive_parts(sizes, step):
    sizes = [*sizes, 8]  # there may be fewer shards than processes
    order = SampleOrder(sizes, 8, 0, 2)
    for world in (1, 2, 4, 8):
        parts = [order.part(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {8 // world}
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))


def test_seeds_and_epochs_give_other_orders():
    orders = [SampleOrder([50, 50, 50], 10, seed, 2) for seed in (0, 1)]
    batches = [order.batch(step) for order in orders for step in (0, order.steps_per_epoch)]
    assert len({tuple(batch) for batch in batches}) == 4


def test_a_window_mixes_its_shards_only():
    order = SampleOrder([100] * 8, 50, 0, 2)
    for window in range(4):  # 200 samples = 4 batches
        shards = {i // 100 for step in range(4) for i in order.batch(4 * window + step)}
        assert len(shards) == 2


def test_the_order_stays_what_it_was():
    # a golden value: if it changes, every resumed run changes
    assert SampleOrder([5, 9, 3, 7], 6, 7, 2).batch(5).tolist() == [16, 22, 21, 17, 12, 2]


def test_any_step_of_a_large_set_is_found_in_milliseconds():
    order = SampleOrder([1281] * 1000, 2048, 0, 8)
    order.batch(0)
    start = time.perf_counter()
    for step in (300, 999, 77_777):
        order.batch(step)
    assert (time.perf_counter() - start) / 3 < 0.1  # 1.5 ms on an idle core; the margin is for a busy one


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(DataError, match="the set has 5 images, fewer than one batch of 8; give fewer per batch"):
        SampleOrder([5], 8, 0, 1)
    with pytest.raises(DataError, match="give at least 1 of each"):
        SampleOrder([5], 0, 0, 1)
    order = SampleOrder([50], 8, 0, 1)
    with pytest.raises(DataError, match="batch 8 is not divisible by 3 processes; try 9"):
        order.part(0, 0, 3)
    with pytest.raises(ValueError, match="rank 2 is not among 2 processes; give 0 to 1"):
        order.part(0, 2, 2)
    with pytest.raises(ValueError, match="step -1 is negative"):
        order.batch(-1)

"""Each pass reads every sample at most once and drops only the remainder, for any processes, workers and shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale import rng
from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.tar_shards import ShardSource
from tests.unit.data.test_data_loader import jpeg

BATCH = 24  # divisible by 1, 2, 3, 4 and 8 processes
SHARDS = {1: [61], 3: [3, 50, 11], 8: [1, 30, 2, 7, 9, 1, 4, 19]}


READERS = ("photos", "class folders", "list.txt", "list.csv")
FILES = 61  # of the sources that are one shard


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int | str, SampleSource]:
    found: dict[int | str, SampleSource] = {}
    for count, sizes in SHARDS.items():
        paths: list[Path] = []
        for number, size in enumerate(sizes):
            folder = tmp_path_factory.mktemp("shards")
            paths += write_shards([Sample(f"{number}-{n}", jpeg(n, 9, 9), n) for n in range(size)], folder)
        found[count] = ShardSource(paths)
    folder = tmp_path_factory.mktemp("photos")
    names = [f"{'2023/01/' * (number % 3 > 0)}{number} ü.jpg" for number in range(FILES)]
    (folder / "2023" / "01").mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number, 9, 9))
    (folder / "list.txt").write_text("\n".join(names[::-1]))
    (folder / "list.csv").write_text("\n".join(["path,label", *(f"{name},{n % 5}" for n, name in enumerate(names))]))
    found["photos"] = build_source("imagefolder", folder)
    found["class folders"] = build_source("imagefolder", f"{folder}/2023/.")
    for name in ("list.txt", "list.csv"):
        found[name] = build_source("list", folder / name)
    return found


def read(source: SampleSource, world: int, workers: int, steps: range, *, seed: int, window: int) -> np.ndarray:
    """Returns the sample ids, (steps, batch), that all processes together read through real worker processes."""
    parts = []
    for rank in range(world):
        order = SampleOrder(source.shard_sizes, BATCH, seed, window)
        loader = TrainLoader(
            source, order, AugmentConfig(), (8, 8), seed=seed, rank=rank, world=world,
            workers=workers, start_step=steps.start, stop_step=steps.stop,
        )  # fmt: skip
        read = list(loader)
        assert [batch.step for batch in read] == list(steps)
        parts.append(np.stack([batch.sample_ids for batch in read]))
    return np.concatenate(parts, axis=1)


@settings(max_examples=50, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 8]),
    workers=st.sampled_from([0, 0, 0, 1, 2, 4]),
    shards=st.sampled_from([*SHARDS, *READERS]),
    window=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_each_sample_is_read_at_most_once_a_pass(sources, world, workers, shards, window, seed):
    source = sources[shards]
    order = SampleOrder(source.shard_sizes, BATCH, seed, window)
    first_pass = range(order.steps_per_epoch)
    ids = read(source, world, workers, first_pass, seed=seed, window=window)
    assert ids.size == source.num_samples - source.num_samples % BATCH
    assert len(np.unique(ids)) == ids.size
    np.testing.assert_array_equal(ids, np.stack([order.batch(step) for step in first_pass]))


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from([3, *READERS]),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2),
    workers=st.tuples(*[st.sampled_from([0, 1, 2])] * 2),
    switch=st.integers(1, 4),
)
def test_other_processes_from_the_middle_of_a_pass_keep_the_order(sources, name, worlds, workers, switch):
    source = sources[name]  # a pass is 1 or 2 batches
    whole = read(source, 1, 0, range(5), seed=1, window=2)
    before = read(source, worlds[0], workers[0], range(switch), seed=1, window=2)
    after = read(source, worlds[1], workers[1], range(switch, 5), seed=1, window=2)
    np.testing.assert_array_equal(np.concatenate([before, after]), whole)


@pytest.mark.parametrize("samples", [1_281_167, 1_000_000_000])
def test_a_batch_in_mid_pass_needs_its_own_window_only(samples, monkeypatch):
    shards = [10_000] * (samples // 10_000) + [samples % 10_000 or 10_000]
    counts: list[int] = []
    permutation = rng.permutation
    monkeypatch.setattr(rng, "permutation", lambda count, *key: counts.append(count) or permutation(count, *key))
    order = SampleOrder(shards, 2048, 0, 8)
    ids = order.batch(order.steps_per_epoch // 2)
    assert len(np.unique(ids)) == 2048 and ids.max() < order.num_samples
    # the cost: one permutation of the shards, and one of each window that the batch touches
    assert counts[0] == len(shards) and len(counts) <= 3 and max(counts[1:]) <= 80_000

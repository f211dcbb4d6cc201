"""What is read ahead and what makes room for it: windows are the batches' own, and the oldest entry goes first."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.cache import FileCache, RemoteFile
from ijepa_scale.data.sources.fetch import Retry
from ijepa_scale.data.sources.synthetic import SyntheticSource
from tests.unit.data.flaky_server import FlakyServer, serving

SIZES = [9, 12, 8, 15, 11, 9, 8]  # 72 samples: 9 whole batches of 8 a pass, one beginning in each shard at least


class Watched(SyntheticSource):
    """Notes which shards it is told to prepare, and which samples are then read."""

    def __init__(self) -> None:
        super().__init__(sum(SIZES), (8, 8))
        self.shard_sizes = np.array(SIZES)
        self.told: list[tuple[list[int], list[int], list[int]]] = []  # now, soon, samples read until the next word

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        self.told.append((now.tolist(), soon.tolist(), []))

    def read(self, sample_id: int) -> np.ndarray:
        self.told[-1][2].append(sample_id)
        return super().read(sample_id)


def shard_of(sample: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), sample, side="right"))


@pytest.mark.parametrize("window_shards", [1, 2, 3, 20])
@pytest.mark.parametrize("start", [0, 5])
def test_prepared_windows_are_those_that_the_batches_read(window_shards: int, start: int) -> None:
    source = Watched()
    order = SampleOrder(source.shard_sizes, 8, 3, window_shards)
    assert order.steps_per_epoch == 9
    loader = TrainLoader(source, order, AugmentConfig(), (8, 8), seed=0, start_step=start, stop_step=27)
    samples = [sample for batch in loader for sample in batch.sample_ids.tolist()]
    assert [sample for *_, read in source.told for sample in read] == samples
    for now, soon, read in source.told:
        assert now == sorted(set(now)) and shard_of(read[0]) in now
        assert {shard_of(sample) for sample in read} <= {*now, *soon}  # a batch may reach into the next window
    for (_, soon, _), (following, *_) in zip(source.told, source.told[1:], strict=False):
        assert soon == following
    if start:
        return
    place = 0  # a window's samples lie together, of all its shards and of no others; windows follow one another
    for now, *_ in source.told:
        end = place + sum(SIZES[shard] for shard in now)
        assert {shard_of(sample) for sample in samples[place:end]} == set(now)
        place = end
    assert place == len(samples) == 3 * sum(SIZES)


def test_windows_follow_each_other_as_they_are_announced() -> None:
    order = SampleOrder(SIZES, 8, 1, 2)
    for epoch in range(3):
        shards = [order.shards(epoch, window).tolist() for window in range(4)]
        assert sorted(shard for window in shards for shard in window) == list(range(len(SIZES)))
        assert [len(window) for window in shards] == [2, 2, 2, 1]
        assert order.shards(epoch, 4).tolist() == order.shards(epoch + 1, 0).tolist()
        ids = np.concatenate([order.batch(step) for step in range(9 * epoch, 9 * (epoch + 1))])
        ends = np.cumsum([sum(SIZES[shard] for shard in window) for window in shards])
        for step in range(9 * epoch, 9 * (epoch + 1)):
            number, window = order.window(step)
            begin = (step - 9 * epoch) * 8
            assert number == epoch and window == int(np.searchsorted(ends, begin, side="right"))
            assert shard_of(int(ids[begin])) in shards[window]


def test_the_cache_lets_go_of_the_file_opened_longest_ago(tmp_path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in "abcdef":
        (shards / name).write_bytes(name.encode() * 100)
    cache = FileCache(tmp_path / "cache", 400, Retry(attempts=2, first_pause_s=0.01), wait_s=1.0)
    with serving(FlakyServer(shards)) as address:
        files = {name: RemoteFile(f"{address}/{name}", 100) for name in "abcdef"}

        def held() -> str:
            return "".join(name for name in files if cache.has(files[name].url))

        for age, name in enumerate("bdac"):  # neither in the order of the names nor of their hashes
            cache.open(files[name]).close()
            os.utime(cache.path(files[name].url), ns=(10**9 * (age + 1),) * 2)
        assert held() == "abcd"
        cache.open(files["b"]).close()  # the oldest file, but now the one opened last
        cache.open(files["e"]).close()
        assert held() == "abce"
        lock = cache.open(files["c"])
        os.utime(cache.path(files["c"].url), ns=(1, 1))
        cache.open(files["f"]).close()
        assert held() == "bcef"  # c is the oldest, and in use
        lock.close()
        cache.open(files["a"]).close()
        assert held() == "abef"

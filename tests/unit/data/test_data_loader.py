"""Batches don't depend on workers, processes or where reading starts; bad samples are replaced and counted."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError


def jpeg(number, height=20, width=24):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width + number % 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def a_source(folder, count=50, bad=()):
    data = [Sample(f"{n:03d}", jpeg(n)[:200] if n in bad else jpeg(n), n % 5) for n in range(count)]
    return ShardSource(write_shards(data, folder, shard_bytes=12_000))


def a_loader(source, batch=8, **options):
    order = SampleOrder(source.shard_sizes, batch, 3, 2)
    options = {"seed": 3, "stop_step": 2 * order.steps_per_epoch, "max_bad_fraction": 1.0, **options}
    return TrainLoader(source, order, AugmentConfig(), (16, 16), **options)


def batches_of(loader):
    return [batch.clone() for batch in loader]


def assert_equal(ours: list[Batch], theirs: list[Batch]):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.step, a.epoch, a.position) == (b.step, b.epoch, b.position)
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.sizes, b.sizes)
        np.testing.assert_array_equal(a.sample_ids, b.sample_ids)


def crops(batches):
    """Returns (sample id, label, crop bytes) of each image, in order."""
    return [
        (int(batch.sample_ids[row]), int(batch.labels[row]), batch.crop(row).numpy().tobytes())
        for batch in batches
        for row in range(len(batch))
    ]


def test_what_a_batch_holds(tmp_path):
    source = a_source(tmp_path)
    batch = next(iter(a_loader(source, start_step=7, rank=1, world=2)))
    assert batch.pixels.dtype == torch.uint8 and len(batch) == 4
    assert len(batch.pixels) == 3 * (batch.sizes[:, 0] * batch.sizes[:, 1]).sum()
    assert (batch.step, batch.epoch, batch.position) == (7, 1, 4)
    assert batch.labels.tolist() == [source.label(int(n)) for n in batch.sample_ids]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_byte(tmp_path, workers):
    source = a_source(tmp_path, bad=(4, 17))
    alone = a_loader(source)
    helped = a_loader(source, workers=workers)
    assert_equal(batches_of(helped), batches_of(alone))
    assert (helped.num_bad, helped.num_seen) == (alone.num_bad, alone.num_seen) == (alone.num_bad, 96)
    assert 2 <= alone.num_bad <= 4


def test_starting_at_a_step_equals_skipping_to_it(tmp_path):
    source = a_source(tmp_path, bad=(4,))
    batches = batches_of(a_loader(source))
    for start in (1, 5, 6, 11):
        loader = a_loader(source, start_step=start)
        assert len(loader) == 12 - start
        assert_equal(batches_of(loader), batches[start:])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_read_what_one_does(tmp_path, world):
    source = a_source(tmp_path, bad=(4, 17, 18))
    alone = a_loader(source)
    loaders = [a_loader(source, rank=rank, world=world) for rank in range(world)]
    together = (batch for step in zip(*loaders, strict=True) for batch in step)
    assert crops(together) == crops(alone)
    assert sum(loader.num_bad for loader in loaders) == alone.num_bad >= 3


def test_a_crop_depends_on_seed_epoch_and_sample_alone(tmp_path):
    source = a_source(tmp_path)
    by_eight = {(n, label): crop for n, label, crop in crops(a_loader(source, batch=8, stop_step=6))}
    by_ten = {(n, label): crop for n, label, crop in crops(a_loader(source, batch=10, stop_step=5))}
    assert all(by_ten[key] == crop for key, crop in by_eight.items()) and len(by_eight) == 48
    next_epoch = {(n, label): crop for n, label, crop in crops(a_loader(source, batch=10, start_step=5))}
    assert sum(next_epoch[key] != crop for key, crop in by_ten.items()) > 40


def test_bad_samples_are_named_and_replaced_by_good_ones(tmp_path, caplog):
    source = a_source(tmp_path, bad=(4, 17))
    with caplog.at_level(logging.WARNING):
        batches = list(a_loader(source, batch=10, stop_step=5))
    assert caplog.text.count("is replaced: not a decodable image") == 2
    assert source.name(4) in caplog.text and source.name(17) in caplog.text
    ids = np.concatenate([batch.sample_ids for batch in batches])
    assert len(ids) == 50 and not {4, 17} & set(ids.tolist())


def test_too_many_bad_samples_end_the_run(tmp_path):
    source = a_source(tmp_path / "a", bad=(4, 17))
    with pytest.raises(
        DataError,
        match=r"1 of .* samples couldn't be decoded \(1 x not decodable\), over data.max_bad_fraction 0; the last",
    ):
        list(a_loader(source, max_bad_fraction=0.0))
    loader = a_loader(source, batch=50, max_bad_fraction=0.03, stop_step=30)
    with pytest.raises(DataError, match="40 of 1000 samples .* fix the data or raise the limit"):
        list(loader)
    assert len(list(a_loader(source, batch=50, max_bad_fraction=0.05, stop_step=30))) == 30


def test_a_batch_of_bad_samples_ends_the_run(tmp_path, monkeypatch):
    source = a_source(tmp_path, bad=range(40))
    order = SampleOrder(source.shard_sizes, 8, 3, 2)
    monkeypatch.setattr(order, "part", lambda step, rank, world: np.arange(8))
    loader = TrainLoader(source, order, AugmentConfig(), (16, 16), seed=0, stop_step=3, max_bad_fraction=1.0)
    with pytest.raises(DataError, match="couldn't be decoded"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_bad_samples_ends_in_one_line(tmp_path, workers):
    source = a_source(tmp_path, bad=range(50))
    with pytest.raises(DataError, match="and 8 replacements drawn for it couldn't be decoded") as caught:
        list(a_loader(source, workers=workers))
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_together_is_refused(tmp_path):
    source = SyntheticSource(64, (8, 8))
    with pytest.raises(DataError, match="batch 8 is not divisible by 3 processes; try 9"):
        a_loader(source, world=3)
    order = SampleOrder([10], 2, 0, 1)
    with pytest.raises(DataError, match="the order counts 10 samples, the source 64"):
        TrainLoader(source, order, AugmentConfig(), (8, 8), seed=0, stop_step=1)


def test_real_photographs(clothing_tar):
    source = ShardSource([clothing_tar])
    loader = a_loader(source, batch=16, stop_step=3)
    for batch in loader:
        assert batch.labels.tolist() == [-1] * 16 and batch.sizes.min() >= 16
    assert loader.num_bad == 0

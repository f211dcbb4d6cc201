"""Sets of 13-band and other deep images through loader, shards and evaluation: order, resume and values as for RGB."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.augment import Augment
from ijepa_scale.config import AugmentConfig, DataConfig
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.decode import CROP_DRAWS, PixelRules, choose_box
from ijepa_scale.data.deep_decode import decode_as
from ijepa_scale.data.eval_reader import EvalReader
from ijepa_scale.data.first_images import check_first
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sanity import sanity_warnings
from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.make import MakePlan, make_shards
from ijepa_scale.data.shards.verify import verify_shards
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.open import training_order, training_source
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from ijepa_scale.rng import uniform
from tests.unit.data.deep_images import npy, png, tiff, values
from tests.unit.data.test_deep_decode import antialiased

BANDS = PixelFormat(13, "uint16")
BATCH, COUNT = 12, 53
SIZES = [(9 + n % 5, 11 + n % 7) for n in range(COUNT)]


def image(n: int) -> np.ndarray:
    return values((*SIZES[n], 13), "uint16", n)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bands")
    encode = (
        lambda n: tiff(image(n)),
        lambda n: npy(image(n)),
        lambda n: tiff(image(n), "separate", compression="zlib"),
    )
    samples = [Sample(f"{n:03d}", encode[n % 3](n), n) for n in range(COUNT)]
    return write_shards(samples, folder, shard_bytes=60_000)


def loader(source, pixels=BANDS, **options):
    order = SampleOrder(source.shard_sizes, BATCH, 3, 2)
    options = {"seed": 3, "stop_step": 2 * order.steps_per_epoch, **options}
    return TrainLoader(source, order, AugmentConfig(), (8, 8), rules=PixelRules(pixels=pixels), **options)


def crops(batches):
    return [
        (batch.step, int(batch.sample_ids[row]), int(batch.labels[row]), batch.crop(row).numpy().tobytes())
        for batch in batches
        for row in range(len(batch))
    ]


def test_batches_hold_the_drawn_crops_of_each_format(shards):
    source = ShardSource(shards)
    assert len(shards) > 2 and source.num_samples == COUNT
    for batch in loader(source):
        assert batch.channels == 13 and batch.pixels.dtype == torch.uint16
        for row, n in enumerate(batch.sample_ids.tolist()):
            draws = uniform(3, "crop", batch.epoch, np.array([n]), CROP_DRAWS)[0]
            top, left, height, width = choose_box(*SIZES[n], draws.tolist(), (0.3, 1.0), (3 / 4, 4 / 3))
            np.testing.assert_array_equal(batch.crop(row).numpy(), image(n)[top : top + height, left : left + width])


@settings(max_examples=8, deadline=None)
@given(
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 2),
    workers=st.tuples(*[st.sampled_from([0, 0, 0, 0, 2])] * 2),
    switch=st.integers(1, 7),
)
def test_each_image_once_a_pass_for_any_processes_and_resumed_anywhere(shards, worlds, workers, switch):
    source = ShardSource(shards)
    whole = crops(loader(source))
    first_pass = [sample for step, sample, _, _ in whole if step < COUNT // BATCH]
    assert len(set(first_pass)) == len(first_pass) == COUNT - COUNT % BATCH

    def of_all(world, workers, **steps):
        parts = [
            [batch.clone() for batch in loader(source, rank=rank, world=world, workers=workers, **steps)]
            for rank in range(world)
        ]
        return [one for step in zip(*parts, strict=True) for one in crops(step)]

    before = of_all(worlds[0], workers[0], stop_step=switch)
    after = of_all(worlds[1], workers[1], start_step=switch)
    assert before + after == whole


def test_micro_batches_and_copies_keep_channels_and_type(shards):
    batch = next(iter(loader(ShardSource(shards)))).clone()
    parts = list(batch.split(3))
    assert crops(parts) == crops([batch]) and {part.pixels.dtype for part in parts} == {torch.uint16}
    assert batch.to("cpu").channels == 13


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (13, "uint16"), (2, "float32"), (4, "uint8")])
@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_the_augmentation_resizes_flips_and_normalises_each_channel(channels, dtype, blur):
    pixels = PixelFormat(channels, dtype)
    source = SyntheticSource(40, (20, 24), pixels=pixels)
    mean, std = tuple(0.1 * (1 + n) for n in range(channels)), tuple(0.2 + 0.1 * n for n in range(channels))
    config = AugmentConfig(mean=mean, std=std, flip=0.5, blur=blur)
    batch = next(iter(loader(source, pixels)))
    found = Augment(config, (8, 8), seed=3, pixels=pixels)(batch)
    assert found.shape == (BATCH, channels, 8, 8) and found.dtype == torch.float32
    flips = uniform(3, "augment", batch.epoch, batch.sample_ids, 14)[:, 0] < 0.5
    assert 0 < flips.sum() < BATCH
    if blur:
        smooth = Augment(config.replace(blur=0.0), (8, 8), seed=3, pixels=pixels)(batch)
        assert (found.var(dim=(2, 3)) < smooth.var(dim=(2, 3))).float().mean() > 0.9
        return
    for row in range(BATCH):
        crop = batch.crop(row).numpy().astype(np.float64) / pixels.white
        across = antialiased(np.moveaxis(crop, 1, 0), 8, False)
        small = antialiased(np.moveaxis(across, 0, 1), 8, False)
        small = small[:, ::-1] if flips[row] else small
        expected = (small - np.array(mean)) / np.array(std)
        limit = 2.5 / 255 / 0.2 if dtype == "uint8" else 1e-4
        assert np.abs(found[row].permute(1, 2, 0).numpy() - expected).max() <= limit


def test_images_of_other_formats_are_bad_samples_named_with_both(tmp_path, caplog):
    samples = [Sample(f"{n:03d}", tiff(image(n)), 0) for n in range(20)]
    samples += [Sample("a", png(values((9, 9, 1), "uint8")), 0), Sample("b", npy(image(1).astype(np.int32)), 0)]
    source = ShardSource(write_shards(samples, tmp_path))
    reading = loader(source, max_bad_fraction=1.0)
    with caplog.at_level(logging.WARNING):
        found = crops(reading)
    assert reading.bad["pixel format"] == reading.num_bad > 0 and not {20, 21} & {sample for _, sample, _, _ in found}
    assert "13 channels of int32, but model.channels is 13 and data.pixels is uint16; convert" in caplog.text
    with pytest.raises(DataError, match="is 13 and data.pixels is uint8; convert"):
        crops(loader(source, PixelFormat(13, "uint8")))


def test_settings_that_fit_no_image_are_named_at_the_start(tmp_path):
    source = ShardSource(write_shards([Sample(str(n), tiff(image(n)), 0) for n in range(20)], tmp_path / "a"))
    check_first(source, BANDS, "ignore", "model")
    text = "all of 8 images that were tried have 13 channels of uint16, but model.channels is {}.*data.pixels is {} .*"
    for pixels, remedy in (
        (PixelFormat(4, "uint16"), "set model.channels=13, or convert"),
        (PixelFormat(13, "float32"), "set data.pixels=uint16, or convert"),
        (PixelFormat(1, "uint8"), "set model.channels=13 data.pixels=uint16, or convert"),
    ):
        with pytest.raises(DataError, match=text.format(pixels.channels, pixels.dtype) + remedy):
            check_first(source, pixels, "ignore", "model")
    with pytest.raises(DataError, match="13 channels of uint16, but model.channels is 3 and data.pixels is uint8"):
        check_first(source, PixelFormat(), "ignore", "model")
    text = [Sample(str(n), png(values((4, 4, 3), "uint8"))[:60], 0) for n in range(9)]
    check_first(ShardSource(write_shards(text, tmp_path / "d")), PixelFormat(), "ignore", "model")
    signed = [Sample(str(n), npy(image(n).astype(np.int16)), 0) for n in range(9)]
    with pytest.raises(
        DataError, match="13 channels of int16, .* save 1 to 16 channels of uint8, uint16, float32: con"
    ):
        check_first(ShardSource(write_shards(signed, tmp_path / "b")), BANDS, "ignore", "model")
    mixed = [Sample(str(n), npy(image(n)[..., : 1 + n % 3]), 0) for n in range(9)]
    with pytest.raises(
        DataError, match="none of 8 images .* and model.encoder.channels is 13 .*: its pixels have 1 channel"
    ):
        check_first(ShardSource(write_shards(mixed, tmp_path / "c")), BANDS, "ignore", "model.encoder")


def test_evaluation_normalises_each_channel(shards):
    mean, std = tuple(0.01 * n for n in range(13)), tuple(0.1 + 0.01 * n for n in range(13))
    options = {"ids": [3, 8], "mean": mean, "std": std, "pixels": BANDS, "crop_fraction": 1.0}
    (batch,) = EvalReader(ShardSource(shards), (8, 8), **options)
    assert batch.images.shape == (2, 13, 8, 8) and batch.labels.tolist() == [3, 8]
    for n, found in zip((3, 8), batch.images, strict=True):
        assert SIZES[n][0] <= SIZES[n][1]  # so that the height is resized to 8
        width = max(8, int(8 * SIZES[n][1] / SIZES[n][0]))
        across = antialiased(np.moveaxis(image(n).astype(np.float64), 1, 0), width, True)
        whole = antialiased(np.moveaxis(across, 0, 1), 8, True).clip(0, 65535)
        left = round((width - 8) / 2)
        expected = (whole[:, left : left + 8] / 65535 - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=2e-4)


def test_warnings_at_the_start_know_the_format(shards):
    source, batch = ShardSource(shards), next(iter(loader(ShardSource(shards))))
    fits = {"mean": (0.5,) * 13, "std": (0.29,) * 13, "pixels": BANDS}
    assert sanity_warnings(source, batch, **fits) == []
    (found,) = sanity_warnings(source, batch, **{**fits, "mean": (0.5 / 257,) * 13, "std": (0.29 / 257,) * 13})
    assert "(by channel), not about 0 and 1" in found and "from 0 to 1, not 0 to 65535" in found
    assert " of 65535" in found


def test_shards_are_made_verified_and_read_back(tmp_path):
    encode = (lambda n: tiff(image(n)), lambda n: npy(image(n)))
    for n in range(20):
        path = tmp_path / "images" / f"c{n % 2}" / f"{n:02d}.{('tif', 'npy')[0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode[n % 2](n))  # what a file is, its bytes say
    made = make_shards(FolderImages(tmp_path / "images"), tmp_path / "shards", plan=MakePlan(pixels=BANDS))
    assert made.num_samples == 20 and not made.left_out
    paths = expand(tmp_path / "shards")
    source = ShardSource(paths)
    kept = sorted(decode_as(BANDS, source.read(n)).tobytes() for n in range(20))
    assert kept == sorted(image(n).tobytes() for n in range(20))
    assert not [fault for verdict in verify_shards(paths, pixels=BANDS) for fault in verdict.faults]
    faults = [fault for verdict in verify_shards(paths, pixels=PixelFormat(3, "uint16")) for fault in verdict.faults]
    assert len(faults) == 20 and "13 channels of uint16, but model.channels is 3" in faults[0]
    with pytest.raises(DataError, match="resize-shorter is 8 and images have 13 channels of uint16; only 8-bit RGB"):
        MakePlan(pixels=BANDS, resize_shorter=8)


def test_arrays_are_images_only_where_nothing_else_is(tmp_path):
    for name in ("photos/a/1.png", "photos/a/1.npy", "photos/features.npy", "arrays/a/1.npy", "arrays/b/2.NPY"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(values((4, 4, 1), "uint8")) if name.endswith("png") else npy(values((4, 4), "uint8")))
    photos, arrays = ImageFolderSource(tmp_path / "photos"), ImageFolderSource(tmp_path / "arrays")
    assert photos.num_samples == 1 and photos.problems().skipped[".npy"] == 2
    assert [arrays.name(n).rsplit("/", 1)[1] for n in range(arrays.num_samples)] == ["1.npy", "2.NPY"]
    assert not arrays.problems().skipped


@pytest.mark.parametrize("order", [("png", "npy"), ("npy", "png")])
@pytest.mark.parametrize("reader", ["shards", "stream"])
def test_a_sample_s_array_is_its_image_only_without_another(tmp_path, order, reader):
    import tarfile

    from tests.unit.data.shards.image_sets import add

    content = {"png": png(values((4, 4, 1), "uint8")), "npy": npy(values((4, 4), "uint8", 1))}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for suffix in order:
            add(tar, f"both.{suffix}", content[suffix])
        add(tar, "alone.npy", content["npy"])

    def read(**members):
        data = DataConfig(reader=reader, train=str(tmp_path), batch_size=1, stream_shuffle=1, **members)
        source = training_source(data, (0, 0))
        if reader == "shards":
            return {source.name(n).rpartition(":")[2]: source.read(n) for n in range(source.num_samples)}
        stream = source.stream(0, 0, 0, 1)
        return {one.name.rpartition(":")[2]: one.data for one in (next(stream) for _ in range(2)) if one.kind is None}

    assert read() == {"both": content["png"], "alone": content["npy"]}
    assert read(image_member="npy") == {"both": content["npy"], "alone": content["npy"]}


@pytest.mark.parametrize(("channels", "dtype"), [(13, "uint16"), (1, "float32"), (3, "uint8")])
def test_synthetic_images_have_the_format_and_the_statistics_they_say(channels, dtype):
    data = DataConfig(reader="synthetic", batch_size=4, synthetic_samples=50, pixels=dtype)
    source = training_source(data, (32, 40), channels)
    pixels = np.stack([source.read(n) for n in range(20)])
    assert pixels.shape[1:] == (32, 40, channels) and pixels.dtype == dtype
    mean, std = source.statistics()
    white = PixelFormat(channels, dtype).white
    np.testing.assert_allclose(pixels.mean(axis=(0, 1, 2)) / white, mean, atol=0.02)
    np.testing.assert_allclose(pixels.std(axis=(0, 1, 2)) / white, std, atol=0.02)
    order = training_order(data, source, 4, seed=0, steps_per_epoch=None)
    rules = PixelRules(pixels=PixelFormat(channels, dtype))
    batch = next(iter(TrainLoader(source, order, AugmentConfig(), (8, 8), seed=0, stop_step=1, rules=rules)))
    assert batch.channels == channels and dataclasses.replace(batch).pixels.dtype == getattr(torch, dtype)

"""`shards.py stats`: exact, the same for any number of processes and any reader; those of other data are refused."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shlex
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config import DataConfig
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.shards.measure import Moments, Sums, measure
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.data.statistics import normalisation_of, read_statistics, statistics_path, write_statistics
from ijepa_scale.errors import DataError
from launch import shards
from tests.unit.data.deep_images import npy, tiff, values

COUNT = 37
KINDS = [(13, "uint16"), (1, "uint8"), (2, "float32"), (3, "uint8")]


def image(n: int, channels: int, dtype: str) -> np.ndarray:
    return values((5 + n % 4, 6 + n % 3, channels), dtype, n)


def folder_of(root, channels, dtype):
    for n in range(COUNT):
        path = root / "images" / f"c{n % 2}" / f"{n:02d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            tiff(image(n, channels, dtype)) if channels != 3 else tiff(image(n, 3, dtype), photometric="rgb")
        )
    return root / "images"


def exact(pixels: list[np.ndarray], white: int) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation by channel from Python's whole numbers alone."""
    columns = [[int(value) for image in pixels for value in image[..., c].ravel()] for c in range(pixels[0].shape[2])]
    means = [Fraction(sum(column), len(column)) for column in columns]
    spreads = [Fraction(sum(v * v for v in column), len(column)) - mean**2
               for column, mean in zip(columns, means, strict=True)]  # fmt: skip
    return [float(mean / white) for mean in means], [math.sqrt(spread / white**2) for spread in spreads]


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_the_command_is_exact_for_any_processes_and_readers(tmp_path, capsys, channels, dtype):
    root = folder_of(tmp_path, channels, dtype)
    pixels = [image(n, channels, dtype) for n in [*range(0, COUNT, 2), *range(1, COUNT, 2)]]  # class by class
    tars = tmp_path / "shards"
    write_shards([Sample(f"{n:03d}", npy(one), 0) for n, one in enumerate(pixels)], tars, shard_bytes=3000)
    rows = ["path,label", *(f"images/c{n % 2}/{n:02d}.tif,{n % 2}" for n in [*range(0, COUNT, 2), *range(1, COUNT, 2)])]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    options = ["--channels", str(channels), "--pixels", dtype]
    found = []
    for data, workers in ((root, 0), (root, 2), (tars, 0), (tmp_path / "list.csv", 0)):
        assert shards.main(["stats", str(data), *options, "--workers", str(workers)]) == 0
        path = statistics_path(str(data))
        assert f"{path}: {COUNT} images with {PixelFormat(channels, dtype)}" in capsys.readouterr().out
        found.append(read_statistics(path))
        assert (found[-1].channels, found[-1].dtype, found[-1].images) == (channels, dtype, COUNT)
        assert found[-1].pixels == sum(one.shape[0] * one.shape[1] for one in pixels)
    assert len({(each.mean, each.std) for each in found}) == 1  # to the last bit
    assert found[0] == found[1] and found[0].fingerprint == ImageFolderSource(root).fingerprint
    assert found[2].fingerprint == ShardSource(sorted(tars.glob("*.tar"))).fingerprint
    if dtype == "float32":
        flat = np.concatenate([one.reshape(-1, channels) for one in pixels]).astype(np.float64)
        np.testing.assert_allclose(found[0].mean, flat.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found[0].std, flat.std(axis=0), rtol=1e-12)
    else:
        mean, std = exact(pixels, np.iinfo(dtype).max)
        assert list(found[0].mean) == mean and list(found[0].std) == std


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(0, 5))
def test_sums_of_parts_are_the_sums_of_all(parts, cut):
    whole, split = Sums(1), [Sums(1), Sums(1)]
    for number, part in enumerate(parts):
        column = np.array(part, dtype=np.uint16)[:, None]
        whole.add(column)
        split[number > cut].add(column)
    split[0].merge(split[1])
    assert split[0].result(65535.0) == whole.result(65535.0)
    flat = np.concatenate([np.array(part) for part in parts])
    count, mean, std = whole.result(65535.0)
    assert (count, *mean, *std) == pytest.approx((len(flat), flat.mean() / 65535, flat.std() / 65535), abs=1e-12)


def test_a_large_offset_does_not_cancel_the_deviation_of_floats():
    pixels = (1e6 + values((1000, 1), "float32")).astype(np.float64)
    found = Moments(1)
    for part in np.array_split(pixels, 7):
        found.add(part)
    _, mean, std = found.result(1.0)
    assert mean[0] == pytest.approx(pixels.mean(), rel=1e-14) and std[0] == pytest.approx(pixels.std(), rel=1e-9)


def data_of(root, **settings):
    return DataConfig(reader="imagefolder", train=str(root), batch_size=1, **settings)


def test_a_run_refuses_what_was_not_measured_and_says_the_command_that_does(tmp_path, monkeypatch, capsys):
    root, pixels = folder_of(tmp_path / "a set", 13, "uint16"), PixelFormat(13, "uint16")

    def found(**changes):
        return normalisation_of(
            data_of(root), pixels=changes.get("pixels", pixels), fingerprint=ImageFolderSource(root).fingerprint
        )

    with pytest.raises(DataError, match="are null and there is no .*/images/pixel_stats.json; run `") as error:
        found()
    command = re.search(r"`python launch/shards.py ([^`]*)`", str(error.value))[1]
    assert shards.main(shlex.split(command)) == 0
    capsys.readouterr()
    mean, std = found()
    assert len(mean) == len(std) == 13 and min(std) > 0
    with pytest.raises(DataError, match="was measured for 13 of uint16, and images have 13 channels of float32; run"):
        found(pixels=PixelFormat(13, "float32"))
    (root / "c0" / "new.tif").write_bytes(tiff(image(0, 13, "uint16")))
    with pytest.raises(DataError, match="was measured on another list of images than .* has now; run `python"):
        found()
    path = root / "pixel_stats.json"
    content, read_back = json.loads(path.read_text()), read_statistics(path)
    for broken in ("{", "[]", json.dumps({**content, "std": [0] * 13}), json.dumps({**content, "mean": [1]}),
                   json.dumps({**content, "version": 9}), json.dumps({**content, "more": 1})):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(DataError, match="pixel_stats.json isn't a file of pixel statistics .*; run `python"):
            found()
    (tmp_path / "nowhere").touch()
    with pytest.raises(DataError, match="pixel_stats.json can't be written .File exists.; make room"):
        write_statistics(read_back, tmp_path / "nowhere" / "pixel_stats.json")
    for reader, train in (("stream", str(tmp_path)), ("shards", "https://example.org/{0..9}.tar")):
        data = DataConfig(reader=reader, train=train, batch_size=1, cache="x")
        with pytest.raises(DataError, match=f"no measured ones can lie next to .* of reader {reader}; give 13 numbers"):
            normalisation_of(data, pixels=pixels, fingerprint="")


def test_bad_images_are_left_out_up_to_a_share_and_constant_channels_refused(tmp_path, caplog, capsys):
    samples = [Sample(f"{n:03d}", npy(image(n, 2, "uint8")), 0) for n in range(20)]
    source = ShardSource(write_shards([*samples, Sample("bad", npy(image(0, 1, "uint8")), 0)], tmp_path / "a"))
    with pytest.raises(DataError, match="1 of 21 images can't be used, over the allowed fraction 0.001; .*1 channel"):
        measure(source, PixelFormat(2))
    assert measure(source, PixelFormat(2), max_bad_fraction=0.1).images == 20
    flat = np.dstack([image(1, 1, "uint8"), np.full((6, 7, 1), 9, np.uint8)])
    constant = ShardSource(write_shards([Sample("1", npy(flat), 0)], tmp_path / "b"))
    with pytest.raises(DataError, match="channel 1 has the value 0.0352941 in all pixels; drop that channel"):
        measure(constant, PixelFormat(2))
    for arguments, text in (
        (["--channels", "17"], "channels is 17; give 1 to 16"),
        (["--max-bad-fraction", "2"], "max-bad-fraction is 2; give a fraction from 0 to 1"),
    ):
        assert shards.main(["stats", str(tmp_path / "a"), *arguments]) == 2
        assert text in capsys.readouterr().err


def test_it_can_be_measured_again_and_without_a_place_to_write_to(tmp_path, monkeypatch, capsys, caplog):
    root = folder_of(tmp_path, 1, "uint16")
    command = ["stats", str(root), "--channels", "1", "--pixels", "uint16", "--workers", "0"]
    with caplog.at_level(logging.INFO):
        assert shards.main(command) == shards.main(command) == 0
    first, second = capsys.readouterr().out.split(str(statistics_path(str(root))))[:2]
    assert re.findall("(?:mean|std) .*", first) == re.findall("(?:mean|std) .*", second) != []
    assert "not read" not in caplog.text

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ijepa_scale.data.statistics.new_file", full)
    assert shards.main(command) == 2
    said = capsys.readouterr()
    assert re.findall("(?:mean|std) .*", said.out) == re.findall("(?:mean|std) .*", first)
    assert "No space left on device" in said.err and "or set augment.mean and augment.std" in said.err

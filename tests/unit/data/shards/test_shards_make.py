"""Making shards: each image appears once, any number of processes writes the same bytes, bad images are left out."""

import io
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.data.decode import decode
from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.journal import JOURNAL
from ijepa_scale.data.shards.make import MakePlan, make_shards, prepare_image
from ijepa_scale.data.shards.write import write_manifest
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError, SampleError
from tests.unit.data.shards.image_sets import class_folders, damaged_folders, encoded, make, pixels_of, tree

SCRIPT = Path(__file__).parents[4] / "launch" / "shards.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return damaged_folders(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """Returns the files that an uninterrupted run writes."""
    to = tmp_path_factory.mktemp("expected")
    make(folder, to)
    return tree(to)


def test_each_image_is_in_the_set_once_with_its_label(folder, expected, tmp_path):
    made = make(folder, tmp_path)
    assert tree(tmp_path) == expected and JOURNAL not in expected and made.num_samples == 28
    source, images = ShardSource(expand(tmp_path)), FolderImages(folder)
    assert len(source.shard_sizes) > 4
    written = sorted((source.read(n), source.label(n)) for n in range(28))
    bad = ("1.JPEG", "2.JPEG")
    good = [n for n in range(30) if Path(images.name(n)).name not in bad]
    assert written == sorted((images.read(n), images.label(n)) for n in good)
    assert source.classes == ["a", "b", "c"] and len(set(source.labels()[: source.shard_sizes[0]])) > 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["left_out"] == {"not decodable": 2} and manifest["samples"] == 28
    assert manifest["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(folder, expected, tmp_path, workers):
    make(folder, tmp_path, workers=workers)
    assert tree(tmp_path) == expected


def test_shards_that_read_back_differently_are_reported(folder, tmp_path):
    row = make(folder, tmp_path).shards[0]
    with pytest.raises(
        DataError, match=rf"reads as {row.samples} samples, but 99 were written .no problems.; check the disk"
    ):
        write_manifest(tmp_path, [replace(row, samples=99)], classes=None)


def test_bad_images_are_named_counted_and_limited(folder, tmp_path, caplog):
    with pytest.raises(DataError, match=r"2 of 30 images can't be used .2 x not decodable., over the allowed fraction"):
        make(folder, tmp_path / "to", max_bad_fraction=0.05)
    named = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(named) == 2 and any("a/1.JPEG: not an image of a known format" in text for text in named)
    assert any("c/2.JPEG: not a decodable image" in text for text in named)
    make(folder, tmp_path / "to", max_bad_fraction=2 / 30)  # the same folder, with a raised limit
    with pytest.raises(DataError, match="there are no samples to write"):
        nothing = tmp_path / "bad" / "a"
        nothing.mkdir(parents=True)
        (nothing / "1.jpg").write_bytes(b"x")
        make(tmp_path / "bad", tmp_path / "to2", max_bad_fraction=1)


def test_files_that_cannot_be_used(tmp_path, caplog, monkeypatch):
    root = class_folders(tmp_path / "set", 6)
    (root / "a" / "gone.jpg").symlink_to("nowhere")
    (root / "a" / "empty.jpg").touch()
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "a" / "wide.png").write_bytes(encoded(0, "PNG", (3, 4000)))
    monkeypatch.setattr("ijepa_scale.data.pil_decode.MAX_PIXELS", 9999)
    (root / "b" / "large.jpg").write_bytes(bytes(5000))
    monkeypatch.setattr("ijepa_scale.data.sources.read_file.MAX_MEMBER_BYTES", 4999)
    made = make(root, tmp_path / "to", max_bad_fraction=1)
    assert made.left_out == {
        "missing file": 1, "image size": 2, "no regular file": 1, "too many pixels": 1
    } and made.num_samples == 6  # fmt: skip
    text = caplog.text
    for part in (
        "gone.jpg: there is no such file",
        "empty.jpg: 0 bytes; give 1 to 4999",
        "large.jpg: 5000 bytes; give",
    ):
        assert part in text
    assert "pipe.jpg: not a regular file; replace or drop it" in text and "4000 x 3 pixels" in text
    if os.geteuid():
        (root / "a" / "1.JPEG").chmod(0)
        with pytest.raises(DataError, match="1.JPEG can't be read .Permission denied.; check its permissions"):
            make(root, tmp_path / "to2", max_bad_fraction=1)


def test_an_unreadable_image_ends_the_run(folder, tmp_path, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ijepa_scale.data.sources.read_file._check_regular", broken)
    with pytest.raises(DataError, match="can't be read .Input/output error.; check its permissions and the disk"):
        make(folder, tmp_path)


def test_a_full_disk_is_reported_and_survived(folder, expected, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"can't be written .No space left on device.; make room or fix"):
            make(folder, tmp_path)
    make(folder, tmp_path)
    assert tree(tmp_path) == expected


def test_a_killed_worker_changes_no_byte(folder, expected, tmp_path):
    killed = []

    def kill(*_):
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    make(folder, tmp_path, workers=1, progress=kill)
    assert killed and tree(tmp_path) == expected


def test_resizing_changes_only_larger_images():
    large, small = encoded(1, "JPEG", (60, 90)), encoded(2, "JPEG", (30, 90))
    assert prepare_image(small, 30) == small and prepare_image(large, None) == large
    stored = prepare_image(large, 30)
    image = Image.open(io.BytesIO(stored))
    assert image.format == "JPEG" and image.size == (45, 30)
    assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # 4:4:4
    reference = Image.fromarray(decode(large)).resize((45, 30), Image.Resampling.BICUBIC)
    assert np.abs(decode(stored).astype(int) - np.asarray(reference)).mean() < 2
    # antialiased: a fine checkerboard becomes grey instead of keeping its contrast
    board = np.indices((80, 80)).sum(0) % 2 * 255
    stream = io.BytesIO()
    Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8)).save(stream, "PNG")
    assert decode(prepare_image(stream.getvalue(), 20))[4:-4, 4:-4].std() < 10
    with pytest.raises(SampleError, match="70000 x 1 pixels can't be stored as JPEG .*; drop it"):
        prepare_image(np.zeros((2, 140_000, 3), dtype=np.uint8), 1)


def test_what_shards_cannot_hold_becomes_png():
    for kind in ("BMP", "PPM"):
        stored = prepare_image(encoded(3, kind), None)
        assert Image.open(io.BytesIO(stored)).format == "PNG"
        np.testing.assert_array_equal(decode(stored), pixels_of(3))
    np.testing.assert_array_equal(decode(prepare_image(pixels_of(3), None)), pixels_of(3))


def test_pixels_make_a_set_too(tmp_path):
    made = make_shards(SyntheticSource(5, (8, 9)), tmp_path)
    assert made.num_samples == 5
    source = ShardSource(expand(tmp_path))
    assert sorted(source.labels()) == [0, 1, 2, 3, 4] and source.classes is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"resize_shorter": 0}, "resize-shorter is 0; give a number of pixels, like 512"),
        ({"prefix": "a/b"}, "prefix 'a/b' can't begin a file name"),
        ({"prefix": ""}, "prefix '' can't begin a file name"),
        ({"prefix": "x{1}"}, "can't begin a file name; give letters, like train"),
    ],
)
def test_invalid_plans_are_refused(plan, message):
    with pytest.raises(DataError, match=message):
        MakePlan(**plan)

"""A bad file costs only itself: replaced in training, named before an evaluation, skipped in prediction."""

import logging
import os
import socket

import numpy as np
import pytest

from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources import read_file
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.sources.tar_index import expand, index_tar
from ijepa_scale.errors import DataError, SampleError
from tests.unit.data.shards.image_sets import class_folders, encoded

KINDS = {
    "dangling.jpg": "missing file", "vanished.jpg": "missing file", "self.jpg": "missing file",
    "pipe.jpg": "no regular file", "device.jpg": "no regular file", "socket.jpg": "no regular file",
    "empty.jpg": "image size", "text.jpg": "not decodable", "cut.jpg": "not decodable",
}  # fmt: skip


@pytest.fixture
def bad_set(tmp_path, monkeypatch):
    """Class folders with 60 good images and each kind of bad file, one of which vanishes after the listing."""
    root = class_folders(tmp_path / "set", 60)
    folder = root / "b"
    (folder / "dangling.jpg").symlink_to("/nowhere/x.jpg")
    (folder / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(folder)  # a socket's path is limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("text")
    (folder / "cut.jpg").write_bytes(encoded(1)[:150])
    (folder / "vanished.jpg").write_bytes(encoded(2))
    source = ImageFolderSource(root)
    (folder / "vanished.jpg").unlink()
    return source


def test_only_regular_files_are_read(bad_set):
    found = {}
    for n in range(bad_set.num_samples):
        try:
            bad_set.read(n)
        except SampleError as error:
            found[os.path.basename(bad_set.name(n))] = error.kind
    assert found == {name: kind for name, kind in KINDS.items() if kind != "not decodable"}
    with pytest.raises(SampleError, match="not a regular file; replace or drop it"):
        read_image_file(bad_set.root)
    with pytest.raises(DataError, match="can't be read .File name too long.; check its permissions and the disk"):
        read_image_file(bad_set.root / ("x" * 300))


def test_a_pipe_that_takes_a_files_place_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "1.jpg"
    path.write_bytes(encoded(1))
    check = read_file._check_regular

    def replace_after_the_check(status):
        check(status)
        if path.is_file():
            path.unlink()
            os.mkfifo(path)

    monkeypatch.setattr(read_file, "_check_regular", replace_after_the_check)
    with pytest.raises(SampleError, match="not a regular file"):
        read_image_file(path)


def loader(source, **options):
    order = SampleOrder(source.shard_sizes, 6, 3, 2)
    options = {"seed": 3, "stop_step": 2 * order.steps_per_epoch, "max_bad_fraction": 1.0, **options}
    return TrainLoader(source, order, AugmentConfig(), (8, 8), **options)


def crops(batches):
    return [
        (int(batch.sample_ids[row]), int(batch.labels[row]), batch.crop(row).numpy().tobytes())
        for batch in batches
        for row in range(len(batch))
    ]


def test_bad_files_are_counted_named_and_replaced_alike_by_all(bad_set, caplog):
    alone = loader(bad_set)
    with caplog.at_level(logging.WARNING):
        expected = crops(alone)
    steps = 2 * (69 // 6)
    assert len(expected) == 6 * steps and set(alone.bad) == set(KINDS.values())
    bad = {n for n in range(69) if os.path.basename(bad_set.name(n)) in KINDS}
    assert len(bad) == len(KINDS) and not bad & {sample for sample, _, _ in expected}
    assert all(label == bad_set.label(sample) for sample, label, _ in expected)
    named = {name for name in KINDS if f"/b/{name} is replaced: " in caplog.text}
    assert len(named) >= len(KINDS) - 2  # an epoch leaves out the 3 samples of its incomplete batch
    assert crops(loader(bad_set, workers=2)) == expected
    assert crops(loader(bad_set, start_step=5)) == expected[30:]
    parts = [loader(bad_set, rank=rank, world=2) for rank in range(2)]
    assert crops(batch for step in zip(*parts, strict=True) for batch in step) == expected
    with pytest.raises(DataError, match="couldn't be decoded .* over data.max_bad_fraction 0; the last is"):
        crops(loader(bad_set, max_bad_fraction=0.0))


def test_a_disk_that_fails_still_ends_the_run(bad_set, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ijepa_scale.data.sources.read_file._check_regular", broken)
    with pytest.raises(DataError, match="can't be read .Input/output error.; check its permissions and the disk"):
        crops(loader(bad_set))


def test_a_pipe_among_shards_is_refused(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DataError, match="shard .*0.tar isn't a regular file; replace it, or drop it from the list"):
        index_tar(expand(tmp_path)[0])
    with pytest.raises(DataError, match="0.tar is a pipe, not a tar of images; give a folder"):
        next(StreamSource(str(tmp_path)).stream(0, 0, 0, 1))


def test_labels_stay_those_of_the_folders(bad_set):
    assert np.bincount(bad_set.labels()).tolist() == [20, 29, 20]

"""Shards, class folders and synthetic images share one protocol; shards are written and read back."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import ConfigError, DataError, SampleError, ShardError


def image(value, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), value, dtype=np.uint8)).save(stream, format)
    return stream.getvalue()


def samples(count=10):
    return [
        Sample(f"{n:04d}", image(n, ("PNG", "JPEG", "WEBP")[n % 3]), n % 3 if n != 4 else None) for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("b", "a", "c")):
            (tmp_path / "set" / split / name / "deep").mkdir(parents=True)
            for index, file in enumerate(("2.png", "10.PNG", "deep/1.png", "note.txt")):
                (tmp_path / "set" / split / name / file).write_bytes(image(10 * number + index))
    return tmp_path / "set"


def test_what_is_written_is_read_back(tmp_path):
    written = samples()
    shards = write_shards(written, tmp_path, shard_bytes=300, classes=["x", "y", "z"])
    source = ShardSource(shards)
    assert len(shards) > 2 and source.shard_sizes.sum() == source.num_samples == 10
    for n, sample in enumerate(written):
        assert source.read(n) == sample.image
        assert source.label(n) == (-1 if sample.label is None else sample.label)
        assert source.name(n).endswith(f".tar:{sample.key}")
    assert json.loads((tmp_path / "classes.json").read_text()) == ["x", "y", "z"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 10 and [row["name"] for row in manifest["shards"]] == [path.name for path in shards]
    assert not list(tmp_path.glob("*.part"))


def test_webdataset_reads_our_shards(tmp_path):
    shards = write_shards(samples(), tmp_path)
    rows = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert [row["__key__"] for row in rows] == [sample.key for sample in samples()]
    assert rows[1]["jpg"] == samples()[1].image and rows[1]["cls"] == b"1"


def test_equal_samples_make_equal_bytes(tmp_path):
    first, second = (write_shards(samples(), tmp_path / name) for name in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert ShardSource(first).fingerprint == ShardSource(second).fingerprint
    other = write_shards(samples(9), tmp_path / "c")
    assert ShardSource(first).fingerprint != ShardSource(other).fingerprint


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", image(0)), "key 'a.b' is empty or has a dot"),
        (Sample("a", b"GIF89a"), "image 'a' begins with b'GIF89a'; give JPEG, PNG, WebP, TIFF, NPY or DICOM"),
    ],
)
def test_what_cannot_be_written(tmp_path, sample, message):
    with pytest.raises(DataError, match=message):
        write_shards([sample], tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_nothing_is_overwritten_and_an_empty_set_is_refused(tmp_path):
    write_shards(samples(), tmp_path)
    with pytest.raises(DataError, match=r"already holds shards .manifest.json.; name an empty one"):
        write_shards(samples(), tmp_path)
    with pytest.raises(DataError, match="there are no samples to write"):
        write_shards([], tmp_path / "empty")


def test_a_source_may_be_pickled_and_forked_after_reading(tmp_path):
    source = ShardSource(write_shards(samples(), tmp_path, shard_bytes=300))
    expected = [source.read(n) for n in range(10)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(n) for n in range(10)] == expected
    child = os.fork()
    if not child:
        same = [source.read(n) for n in reversed(range(10))] == expected[::-1]
        os._exit(0 if same else 1)
    assert [source.read(n) for n in range(10)] == expected
    assert os.waitpid(child, 0)[1] == 0


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_scale.data.sources.tar_shards._OPEN_FILES", 2)
    source = ShardSource(write_shards(samples(), tmp_path, shard_bytes=100))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert [source.read(n) for n in (0, 9, 5, 0)] == [samples()[n].image for n in (0, 9, 5, 0)]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 2


def test_a_shard_that_changes_or_disappears_is_reported(tmp_path):
    shards = write_shards(samples(), tmp_path)
    source = ShardSource(shards)
    os.utime(shards[0], ns=(5, 5))
    with pytest.raises(ShardError, match=r"has changed since it was indexed \(written at another time\); put it back"):
        source.read(0)
    source = ShardSource(shards)
    source.read(0)
    before = shards[0].stat().st_size
    os.truncate(shards[0], 600)
    with pytest.raises(ShardError, match=rf"has changed since it was indexed \(600 bytes instead of {before}\)"):
        source.read(9)
    os.unlink(shards[0])
    for each in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(ShardError, match="has gone since it was indexed; put it back, or start again"):
            each.read(0)
    with pytest.raises(IndexError, match="sample 10 is not among 10"):
        source.label(10)
    with pytest.raises(DataError, match="list of shards is empty"):
        ShardSource([])


def test_class_folders_are_torchvisions(folder):
    theirs = ImageFolder(str(folder / "train"))
    for root in (folder, folder / "train"):
        source = ImageFolderSource(root)
        assert [(source.name(n), source.label(n)) for n in range(source.num_samples)] == theirs.samples
        assert source.classes == theirs.classes and source.shard_sizes.tolist() == [9]
    assert source.read(0) == Path(theirs.samples[0][0]).read_bytes()
    assert ImageFolderSource(folder / "val").fingerprint == source.fingerprint


def test_a_class_called_train_is_a_class(folder):
    (folder / "train" / "train").mkdir()
    (folder / "train" / "train" / "1.png").write_bytes(image(1))
    with pytest.raises(DataError, match=r"splits \(train\) next to others \(a, b, c\); give .*/train/\. if"):
        ImageFolderSource(folder / "train")
    assert ImageFolderSource(f"{folder}/train/.").classes == ["a", "b", "c", "train"]


def test_class_folders_with_mistakes(folder, tmp_path):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="class folder .*empty holds no image"):
        ImageFolderSource(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no class folders"):
        ImageFolderSource(tmp_path / "nothing")
    source = ImageFolderSource(folder / "val")
    (folder / "val" / "a" / "10.PNG").unlink()
    with pytest.raises(SampleError, match="there is no such file, or it is a broken link; fetch it"):
        source.read(0)


def test_synthetic_images_are_repeatable():
    first, second = SyntheticSource(3000, (8, 9)), SyntheticSource(3000, (8, 9))
    assert first.read(7).shape == (8, 9, 3) and first.shard_sizes.sum() == 3000
    np.testing.assert_array_equal(first.read(7), second.read(7))
    assert not np.array_equal(first.read(7), first.read(8))
    assert first.label(1234) == 234 and first.name(5) == "synthetic:5"


def test_build_source(tmp_path, folder):
    write_shards(samples(), tmp_path / "shards")
    assert build_source("shards", tmp_path / "shards").num_samples == 10
    assert build_source("imagefolder", folder / "val").num_samples == 9
    with pytest.raises(DataError, match="holds splits, and which one to evaluate on isn't chosen here; give .*/val"):
        build_source("imagefolder", folder)
    assert build_source("synthetic", None, num_samples=77).num_samples == 77
    with pytest.raises(DataError, match="reader 'shards' has no data to read; name it"):
        build_source("shards", None)
    with pytest.raises(ConfigError, match="reader 'lmdb' is unknown; choose one of shards"):
        build_source("lmdb", tmp_path)
    with pytest.raises(DataError, match="no-such.* matches no file"):
        build_source("shards", tmp_path / "no-such")
    with pytest.raises(
        DataError, match="folder .*no-such doesn't exist or can't be reached; give the folder with CLASS"
    ):
        build_source("imagefolder", tmp_path / "no-such")

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.data.shards import fashion_mnist
from ijepa_scale.data.shards.fashion_mnist import fetch, load, read_idx, write_fashion_mnist_shards
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError

COUNTS = {"train": 10, "t10k": 4}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Writes a folder of small IDX files, one of them compressed, that pass for Fashion-MNIST."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    hashes = {}
    for prefix, count in COUNTS.items():
        files = {
            f"{prefix}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28)),
            f"{prefix}-labels-idx1-ubyte": np.arange(count) % 10,
        }
        for name, array in files.items():
            hashes[name] = hashlib.sha256(idx(array)).hexdigest()
            (folder / name).write_bytes(idx(array))
    packed = folder / "train-images-idx3-ubyte"
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    return folder


def read_shards(folder: Path, pattern: str) -> list[tuple[np.ndarray, int]]:
    samples = []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        keys = sorted({name.split(".")[0] for name in members})
        for key in keys:
            image = np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])))
            samples.append((image, int(members[f"{key}.cls"])))
    return samples


def test_shards_hold_every_image_and_label(source, tmp_path):
    to = write_fashion_mnist_shards(fetch(source), tmp_path / "shards", train_shards=3, test_shards=1)
    assert sorted(str(path.relative_to(to)) for path in to.rglob("*.*")) == [
        "few/0000.tar", "few/classes.json", "manifest.json", "test/0000.tar", "test/classes.json",
        "train/0000.tar", "train/0001.tar", "train/0002.tar", "train/classes.json",
    ]  # fmt: skip
    assert ShardSource([to / "test/0000.tar"]).classes[9] == "Ankle boot"
    for split in ("train", "test"):
        images, labels = load(source, split)
        samples = read_shards(to, f"{split}/*.tar")
        assert [label for _, label in samples] == labels.tolist()
        assert all(np.array_equal(image, expected) for (image, _), expected in zip(samples, images, strict=True))


def test_the_few_are_the_first_of_each_class(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "FEW_PER_CLASS", 1)
    to = write_fashion_mnist_shards(source, tmp_path / "shards")
    images, labels = load(source, "train")
    expected = [row for row, label in enumerate(labels) if label not in labels[:row]]
    few = read_shards(to, "few/*.tar")
    assert [label for _, label in few] == labels[expected].tolist() and len(set(labels[expected])) == len(expected)
    assert all(np.array_equal(image, images[row]) for (image, _), row in zip(few, expected, strict=True))


def test_shards_are_written_once_and_repaired(source, tmp_path):
    to = write_fashion_mnist_shards(source, tmp_path / "shards", train_shards=2)
    first = to / "train/0000.tar"
    content, inode = first.read_bytes(), first.stat().st_ino
    write_fashion_mnist_shards(source, to, train_shards=2)
    assert first.stat().st_ino == inode  # untouched
    first.write_bytes(content[:-512])
    write_fashion_mnist_shards(source, to, train_shards=2)
    assert first.read_bytes() == content  # repaired
    (to / "manifest.json").write_text("{")
    write_fashion_mnist_shards(source, to, train_shards=2)
    assert first.stat().st_ino != inode


def test_another_number_of_shards_is_not_taken_for_the_same(source, tmp_path):
    to = write_fashion_mnist_shards(source, tmp_path / "shards", train_shards=2)
    write_fashion_mnist_shards(source, to, train_shards=3)
    assert len(read_shards(to, "train/*.tar")) == 10 and (to / "train/0002.tar").exists()
    message = r"holds train/0001.tar, which isn't one of train/0000.tar, few/0000.tar, test/0000.tar"
    with pytest.raises(DataError, match=message):
        write_fashion_mnist_shards(source, to, train_shards=1)


def test_shards_of_another_kind_are_left_alone(source, tmp_path):
    to = tmp_path / "shards"
    to.mkdir()
    (to / "mine.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds mine.tar, which isn't one of train/0000.tar, .*delete it or choose"):
        write_fashion_mnist_shards(source, to)
    assert [path.name for path in to.iterdir()] == ["mine.tar"]


def test_fetch_refuses_other_files(source):
    (source / "t10k-labels-idx1-ubyte").write_bytes(b"other")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte has SHA-256 d9298a10d1b0… instead of .*again"):
        fetch(source)
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte is missing, and so is .*give a folder with"):
        fetch(source)


def test_fetch_refuses_a_damaged_archive(source):
    packed = source / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte can't be read .*fetch the file again"):
        fetch(source)


def test_fetch_refuses_a_bomb(source, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_LARGEST_FILE", 1000)
    with pytest.raises(DataError, match="holds more than 1000 bytes; Fashion-MNIST's files don't"):
        fetch(source)


def test_fetch_says_what_to_do_where_nothing_works(tmp_path, monkeypatch):
    def offline(folder):
        raise RuntimeError("Error downloading\nmore")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(fashion_mnist, "_from_torchvision", offline)
    with pytest.raises(DataError) as error:
        fetch()
    assert "\n" not in str(error.value)
    assert "needs apt-get and root; Error downloading" in str(error.value)
    assert "run: make demo FASHION_MNIST=FOLDER" in str(error.value)


def test_fetch_installs_the_package_then_turns_to_torchvision(source, tmp_path, monkeypatch):
    commands = []

    def apt(command, **_):
        commands.append(command[2])
        return subprocess.CompletedProcess(command, 100, "", "W: slow\nE: no such package")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 0)
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(fashion_mnist.subprocess, "run", apt)
    monkeypatch.setattr(fashion_mnist, "_from_torchvision", lambda folder: source)
    assert fetch() == source
    assert commands == ["update"]
    monkeypatch.setattr(fashion_mnist, "_from_torchvision", lambda folder: tmp_path)
    with pytest.raises(DataError, match=r"apt-get update failed: E: no such package; .*is missing"):
        fetch()


def test_read_idx_refuses_what_it_is_not():
    whole = idx(np.zeros((2, 3)))
    assert read_idx(whole, "x").shape == (2, 3)
    for content in (b"", whole[:-1], whole + b"0", b"\0\0\x0d\2" + whole[4:], whole[:5]):
        with pytest.raises(DataError, match=r"x \(\d+ bytes\) isn't an IDX file of bytes, or is cut short; fetch it"):
            read_idx(content, "x")


def test_load_refuses_parts_that_do_not_fit(source):
    (source / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(5)))
    with pytest.raises(DataError, match=r"images \(4, 28, 28\) and labels \(5,\) of test don't belong together"):
        load(source, "test")


@pytest.mark.skipif(not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_files():
    images, labels = load(fetch(), "test")
    assert images.shape == (10_000, 28, 28) and np.bincount(labels).tolist() == [1000] * 10

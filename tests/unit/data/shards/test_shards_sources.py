"""The sources of a set's images: class folders, tars, tars of tars, CSV lists, torchvision's data sets."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torchvision
from PIL import Image

from ijepa_scale.data.decode import decode
from ijepa_scale.data.shards.command_line import open_images
from ijepa_scale.data.shards.image_files import CsvImages, FolderImages
from ijepa_scale.data.shards.known import TorchvisionImages
from ijepa_scale.data.shards.make import MakePlan, make_shards
from ijepa_scale.data.shards.tars import TarImages
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from tests.unit.data.shards.image_sets import add, class_folders, encoded, pixels_of, tar_of, tar_of_tars, tree


def made(source, to):
    """Returns the files made from a source."""
    make_shards(source, to, plan=MakePlan(shard_bytes=3000))
    return tree(to)


def images_of(source):
    return [(source.read(n), source.label(n)) for n in range(source.num_samples)]


def list_of(root, path, relative=True):
    """Writes a CSV of class folders."""
    source = FolderImages(root)
    lines = ["path,label,remark"]
    for n in range(source.num_samples):
        name = os.path.relpath(source.name(n), path.parent) if relative else source.name(n)
        lines.append(f'"{name}", {source.classes[source.label(n)]}, x')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def test_all_kinds_of_sources_make_the_same_shards(tmp_path):
    root = class_folders(tmp_path / "set", 20, ("n02", "n01", "n03"))
    expected = made(FolderImages(root), tmp_path / "1")
    assert len(expected) > 6
    assert made(TarImages(tar_of(root, tmp_path / "a.tar")), tmp_path / "2") == expected
    assert made(TarImages(tar_of(root, tmp_path / "b.tar", "./")), tmp_path / "3") == expected
    assert made(TarImages(tar_of_tars(root, tmp_path / "c.tar")), tmp_path / "4") == expected
    assert made(CsvImages(list_of(root, tmp_path / "l.csv")), tmp_path / "5") == expected
    assert made(CsvImages(list_of(root, tmp_path / "m.csv", relative=False)), tmp_path / "6") == expected


def test_splits_are_found_by_name(tmp_path):
    for split, count in (("train", 6), ("val", 4)):
        class_folders(tmp_path / "set" / split, count)
    tar = tar_of(tmp_path / "set", tmp_path / "a.tar")
    wrapped = tar_of(tmp_path / "set", tmp_path / "b.tar", "imagenet/")
    for kind, root in (("imagefolder", tmp_path / "set"), ("tar", tar)):
        train, val = open_images(kind, str(root)), open_images(kind, str(root), split="val")
        assert (train.num_samples, val.num_samples) == (6, 4) and train.classes == val.classes == ["a", "b", "c"]
        assert train.fingerprint != val.fingerprint and train.origin != val.origin
        with pytest.raises(DataError, match="test"):
            open_images(kind, str(root), split="test")
    with pytest.raises(DataError, match="are in its folder 'imagenet'; give --split imagenet if .* --split . if it"):
        TarImages(wrapped)
    assert images_of(TarImages(wrapped, "imagenet/val")) == images_of(TarImages(tar, "val"))
    assert TarImages(wrapped, ".").classes == ["imagenet"]


def test_the_real_photos(clothing_tar):
    train, val = TarImages(clothing_tar), TarImages(clothing_tar, "val")
    assert train.num_samples == 600 and val.num_samples == 245 and len(train.classes) == 10
    assert np.bincount(train.labels()).tolist() == [60] * 10
    for sample in (0, 599):
        assert f"train/{train.classes[train.label(sample)]}/" in train.name(sample)
        assert decode(train.read(sample)).ndim == 3


def test_a_tar_may_be_pickled_after_reading(tmp_path):
    source = TarImages(tar_of(class_folders(tmp_path / "set", 5), tmp_path / "a.tar"))
    expected = images_of(source)
    assert images_of(pickle.loads(pickle.dumps(source))) == expected


def hostile(path):
    """Writes a tar with two usable images and each kind of member that isn't used."""
    with tarfile.open(path, "w") as tar:
        add(tar, "a/1.jpg", encoded(1))
        for name in ("../up.jpg", "/abs.jpg", "a/../../b.jpg"):
            add(tar, name, encoded(2))
        for name, kind in (
            ("a/link.jpg", tarfile.SYMTYPE),
            ("a/hard.jpg", tarfile.LNKTYPE),
            ("dev.tar", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("a/note.txt", "a/._1.jpg", ".hidden/2.jpg", "__MACOSX/._x"):
            add(tar, name, b"text")
        add(tar, "a/empty.jpg", b"")
        add(tar, "lost.jpg", encoded(3))
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as inner:
            add(inner, "../../x.jpg", encoded(4))
            add(inner, "2.jpg", encoded(5))
            add(inner, "deeper.tar", encoded(5))
        add(tar, "b.tar", stream.getvalue())
        add(tar, "a/1.jpg", encoded(6))  # appending it again is tar's way of replacing a member


def test_hostile_members_are_left_out_and_counted(tmp_path):
    hostile(tmp_path / "a.tar")
    source = TarImages(tmp_path / "a.tar")
    assert images_of(source) == [(encoded(6), 0), (encoded(5), 1)] and source.classes == ["a", "b"]
    problems = source.problems()
    assert problems.counts == {"unsafe name": 4, "link or device": 3, "image size": 1, "no class": 1}
    assert f"{tmp_path}/a.tar:b/../../x.jpg" in [problem.name for problem in problems.named]
    with pytest.raises(DataError, match="9 of 11 images can't be used .4 x unsafe name, 3 x link or device"):
        make_shards(source, tmp_path / "to")
    result = make_shards(source, tmp_path / "to", max_bad_fraction=0.9)
    assert result.num_samples == 2 and result.left_out.total() == 9


def test_incomplete_tars_and_other_files_are_refused(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "set", 9)
    path = tar_of_tars(root, tmp_path / "a.tar")
    content = path.read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[:9000])
    with pytest.raises(DataError, match="cut.tar is cut short or damaged after byte .*; copy it again: a set made"):
        TarImages(cut)
    with tarfile.open(tmp_path / "inner.tar", "w") as tar:
        add(tar, "n01.tar", content[: content.index(b"b.tar")][: -512 * 3])
        add(tar, "n02.tar", b"no tar" * 200)
    with pytest.raises(DataError, match="inner.tar:n01.tar is cut short or damaged"):
        TarImages(tmp_path / "inner.tar")
    with tarfile.open(tmp_path / "inner2.tar", "w") as tar:
        add(tar, "n02.tar", b"no tar" * 200)
    with pytest.raises(DataError, match="inner2.tar:n02.tar is cut short or damaged after byte 512 .no end mark"):
        TarImages(tmp_path / "inner2.tar")
    (tmp_path / "text.tar").write_bytes(b"no tar" * 200)
    for name in ("text.tar", "missing.tar"):
        with pytest.raises(DataError, match=f"{name} isn't a readable tar .*; give a complete, uncompressed one"):
            TarImages(tmp_path / name)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a/1.jpg", encoded(1))
    with pytest.raises(DataError, match="packed.tar isn't a readable tar"):
        TarImages(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        add(tar, "1.jpg", encoded(1))
    assert TarImages(tmp_path / "flat.tar").labels().tolist() == [-1]
    with pytest.raises(DataError, match=r"flat.tar holds no images in class folders, .*list the files in a CSV"):
        TarImages(tmp_path / "flat.tar", ".")
    with pytest.raises(DataError, match="a.tar holds no image in a folder 'val'; its folders are a, b, c"):
        TarImages(path, "val")
    monkeypatch.setattr("ijepa_scale.data.sources.scan.MAX_MEMBERS", 2)
    with pytest.raises(DataError, match="over 2 members; write smaller shards"):
        TarImages(path)


def test_an_inner_tar_ends_where_the_outer_one_says(tmp_path):
    """An inner tar without its end mark must not be read beyond its end into the next member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as inner:
        add(inner, "1.jpg", encoded(1))
    size = 512 + -(-len(encoded(1)) // 512) * 512
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "n01.tar", stream.getvalue()[:size])
        add(tar, "n02.tar", stream.getvalue())
    with pytest.raises(DataError, match="n01.tar is cut short or damaged after byte .*no end mark"):
        TarImages(tmp_path / "a.tar")


def test_a_tar_that_changes_is_reported(tmp_path):
    source = TarImages(tar_of(class_folders(tmp_path / "set", 5), tmp_path / "a.tar"))
    os.utime(tmp_path / "a.tar", ns=(5, 5))
    with pytest.raises(DataError, match="a.tar has changed since it was listed; start again in an empty folder"):
        source.read(0)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="a.tar can't be read .No such file"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_numbers_in_a_list_stay_as_they_are(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "list.csv").write_text("label,path\n7,1.jpg\n\n003,2.jpg\n")
    source = CsvImages(tmp_path / "list.csv")
    assert source.labels().tolist() == [7, 3] and source.classes is None
    assert source.read(0) == encoded(1)
    result = make_shards(source, tmp_path / "to")
    assert result.num_samples == 2 and not (tmp_path / "to" / "classes.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"begins with \[\]; its first line must name columns path and label"),
        (b"file,label\na.jpg,1\n", r"begins with \['file', 'label'\]; its first line"),
        (b"path,label\n", "lists no images; add lines with path,label"),
        (b"path,label\na.jpg,1\nb.jpg\n", r"line 3: \['b.jpg'\] lacks a path or a label; add it"),
        (b"path,label\n,1\n", "line 2: .* lacks a path or a label"),
        (b"path,label\na.jpg,1\nb.jpg,cat\n", "has labels '1' and 'cat'; use either only numbers or only names"),
        (b"path,label\na.jpg,2147483648\n", "has the label 2147483648; labels are below 2147483648"),
        (b"path,label\na.jpg,1" + b"0" * 5000 + b"\n", "has the label 10000000000000000000; labels are below"),
        (b'path,label\n"a.jpg,1\n', "isn't a CSV file .*; save it as UTF-8"),
        (b"path,label\n\xff\xfe.jpg,1\n", "isn't a CSV file .*; save it as UTF-8"),
        (b"path,label\na\0.jpg,1\n", "lacks a path or a label|isn't a CSV file"),
        (None, "can't be read .No such file or directory.; give a CSV file with path,label"),
    ],
)
def test_lists_with_mistakes(tmp_path, content, message):
    if content is not None:
        (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        CsvImages(tmp_path / "list.csv")


def fashion_mnist(root, count=6):
    """Writes a small data set into the folder where torchvision expects FashionMNIST."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for name in ("train", "t10k"):
        header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">u4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) + (name == "t10k")
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([count], ">u4").tobytes() + labels.tobytes()
        )
    return pixels


def test_a_torchvision_set_is_stored_without_loss(tmp_path):
    pixels = fashion_mnist(tmp_path)
    train, test = TorchvisionImages("FashionMNIST", tmp_path), open_images("FashionMNIST", str(tmp_path), split="test")
    assert train.labels().tolist() == [0, 1, 2, 3, 4, 5] and test.labels().tolist() == [1, 2, 3, 4, 5, 6]
    assert train.classes[9] == "Ankle boot" and train.fingerprint != test.fingerprint
    make_shards(train, tmp_path / "to")
    source = ShardSource(expand(tmp_path / "to"))
    for n in range(6):
        image = Image.open(io.BytesIO(source.read(n)))
        assert image.format == "PNG" and image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), pixels[source.label(n)])
    assert source.classes == train.classes


def test_cifar_and_unlabelled_stl(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.stack([pixels_of(n, 32, 32) for n in range(2)])
    rows = images.transpose(0, 3, 1, 2).reshape(2, -1)
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 8]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # knows the real hashes
    source = TorchvisionImages("CIFAR10", tmp_path)
    assert source.num_samples == 10 and source.label(1) == 8 and source.classes == list("abcdefghij")
    np.testing.assert_array_equal(decode(source.read(1)), images[1])
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96 * 2))
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    source = TorchvisionImages("STL10", tmp_path, split="unlabeled")
    assert source.labels().tolist() == [-1, -1]
    make_shards(source, tmp_path / "to")
    assert ShardSource(expand(tmp_path / "to")).labels().tolist() == [-1, -1]


def test_torchvision_sets_with_mistakes(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="data set 'os' is unknown; choose one of MNIST, FashionMNIST, .*SVHN"):
        TorchvisionImages("os", tmp_path)
    with pytest.raises(DataError, match="CIFAR10 has no split 'val'; choose train, test"):
        TorchvisionImages("CIFAR10", tmp_path, split="val")
    with pytest.raises(DataError, match="CIFAR10 can't be read from .*not found.*; put its files into .*--download"):
        TorchvisionImages("CIFAR10", tmp_path)

    class Missing:
        def __init__(self, *_, **__):
            raise ModuleNotFoundError("No module named 'scipy'")

    class Offline:
        def __init__(self, root, download, train):
            raise OSError(f"no route to host\n{download}")

    monkeypatch.setattr(torchvision.datasets, "SVHN", Missing)
    monkeypatch.setattr(torchvision.datasets, "KMNIST", Offline)
    with pytest.raises(DataError, match="SVHN needs a package that isn't installed .No module .*'scipy'.; install it"):
        TorchvisionImages("SVHN", tmp_path)
    with pytest.raises(DataError, match=r"KMNIST can't be read from .* .no route to host.; check the connection"):
        TorchvisionImages("KMNIST", tmp_path, download=True)


def test_arguments_of_other_readers_are_refused(tmp_path):
    with pytest.raises(DataError, match="--download is for torchvision's data sets, not for tar; drop it"):
        open_images("tar", str(tmp_path), download=True)
    with pytest.raises(DataError, match="--split val is not for csv; list the images of the split in a"):
        open_images("csv", str(tmp_path), split="val")

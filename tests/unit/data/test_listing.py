"""One rule set for folders, tars, lists and shards: the same samples and counts, and torchvision's where defined."""

import csv
import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from ijepa_scale.data.decode import decode
from ijepa_scale.data.formats import formats, image_suffixes, is_image, is_other_image, junk, junk_in, suffix_of
from ijepa_scale.data.shards.image_files import CsvImages, FolderImages
from ijepa_scale.data.shards.make import make_shards
from ijepa_scale.data.shards.tars import TarImages
from ijepa_scale.data.shards.zips import ZipImages
from ijepa_scale.data.sources import remote
from ijepa_scale.data.sources.cache import FileCache
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.listing import FolderListing
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.shard_manifest import read_manifest
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from tests.unit.data.shards.image_sets import class_folders, encoded, tar_of, zip_of

CLASSES = ("a", "B", "c d", "ü", "n01")
PLACES = ("", "deep/", "deep/er/", "deep-x/", "x.jpg/")
IMAGES = ("1.jpg", "2.JPEG", "10.png", "é.Jfif", "0.PGM", "3.tif", "4.x.webp", "5.bmp")
OTHERS = {"note.txt": ".txt", "6.HEIC": ".heic", "7.psd": ".psd", "readme": "no suffix", "8.jpg~": ".jpg~"}
JUNK = {
    ".DS_Store": ".DS_Store", "._1.jpg": "._*", "Thumbs.db": "Thumbs.db", "DESKTOP.INI": "DESKTOP.INI",
    ".ipynb_checkpoints/1-checkpoint.jpg": ".ipynb_checkpoints", "__MACOSX/._1.jpg": "__MACOSX",
    "@eaDir/1.jpg/SYNOPHOTO.jpg": "@eaDir", ".hidden.png": ".*.png",
}  # fmt: skip
UNREAD = {".heic", ".psd"}

entries = st.sets(st.tuples(st.sampled_from(PLACES), st.sampled_from([*IMAGES, *OTHERS, *JUNK])), max_size=8)
trees = st.dictionaries(st.sampled_from(CLASSES), entries, min_size=2, max_size=4)


def write(root, trees):
    """Writes class folders, each with at least one image, and returns {path: seed} of the images."""
    images = {}
    for name, entries in trees.items():
        for place, file in sorted({*entries, ("", "first.jpg")}):
            path = root / name / place / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(len(images), ("JPEG", "PNG")[len(images) % 2]))
            if file in (*IMAGES, "first.jpg"):
                images[str(path.relative_to(root))] = len(images)
    return images


def passed_over(trees):
    """Returns what must be counted as passed over: images of other formats, and the rest."""
    kinds = Counter()
    for entries in trees.values():
        for _, file in entries:
            kinds.update([(JUNK | OTHERS)[file]] if file not in IMAGES else [])
    unread = Counter({kind: count for kind, count in kinds.items() if kind in UNREAD})
    return unread, kinds - unread


def list_of(source, path):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for number in range(source.num_samples):
            rows.writerow([source.name(number), source.classes[source.label(number)]])
    return path


@settings(max_examples=40, deadline=None)
@given(trees)
def test_folder_tar_list_and_shards_of_one_tree_agree(tmp_path_factory, trees):
    tmp_path = tmp_path_factory.mktemp("tree")
    images = write(tmp_path / "set", trees)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "set", ".")
    zipped = ZipImages(zip_of(tmp_path / "set", tmp_path / "a.zip"))
    folder, tar = FolderImages(tmp_path / "set"), TarImages(tmp_path / "a.tar")
    classes = sorted(trees)
    expected = sorted((classes.index(path.split("/")[0]), path) for path in images)
    for source in (folder, tar, zipped):
        names = [re.sub(r"\.(tar|zip):", "/", source.name(n)) for n in range(source.num_samples)]
        names = [os.path.relpath(name, tmp_path) for name in names]
        found = [(source.label(n), name.split("/", 1)[1]) for n, name in enumerate(names)]
        assert sorted(found) == expected and source.classes == classes
        assert (source.problems().unread, source.problems().skipped) == passed_over(trees)
        assert not source.problems().counts
    listed = CsvImages(list_of(folder, tmp_path / "list.csv"))
    sources = (folder, tar, zipped, listed)
    assert len({tuple((s.read(n), s.label(n)) for n in range(s.num_samples)) for s in sources}) == 1
    made = []
    for number, source in enumerate(sources):
        result = make_shards(source, tmp_path / str(number))
        shards = ShardSource(expand(tmp_path / str(number)))
        made.append([(shards.read(n), shards.label(n)) for n in range(shards.num_samples)])
        assert shards.classes == classes and result.num_samples == len(images)
        assert result.left_out == (source.problems().unread if source is not listed else {})
    assert made.count(made[0]) == len(sources)


broken = st.sampled_from(["file", "dangling", "pipe", "empty", "text", "to itself", "link"])
broken_trees = st.dictionaries(
    st.sampled_from(CLASSES),
    st.dictionaries(st.tuples(st.sampled_from(PLACES), st.sampled_from(["1.jpg", "2.PNG", "3.tif", "4.txt"])), broken),
    min_size=2,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(broken_trees)
def test_images_that_cannot_be_read_keep_torchvisions_numbers(tmp_path_factory, trees):
    root = tmp_path_factory.mktemp("tree")
    for name, entries in trees.items():
        for (place, file), kind in {**entries, ("", "first.jpg"): "file"}.items():
            path = root / name / place / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "pipe":
                os.mkfifo(path)
            elif kind in ("dangling", "to itself", "link"):
                path.symlink_to(
                    {"dangling": "nowhere.jpg", "to itself": path.name}.get(kind, root / name / "first.jpg")
                )
            else:
                path.write_bytes({"empty": b"", "text": b"text"}.get(kind, encoded(1)))
    theirs = ImageFolder(str(root))
    assert ".tif" in IMG_EXTENSIONS
    source = ImageFolderSource(root)
    assert [(source.name(n), source.label(n)) for n in range(source.num_samples)] == theirs.samples
    assert source.classes == theirs.classes and source.labels().tolist() == theirs.targets


FOLDERS = ("a", "a/x", "a/x/y", "b", "b/x", "c")
TARGETS = (*FOLDERS, ".", "..", "../outside", "../outside/inner")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from((".", *FOLDERS)), st.sampled_from(TARGETS), max_size=5))
def test_each_real_folder_is_listed_once(tmp_path_factory, links):
    """Whatever the links: own paths win, nothing appears twice, and what lies outside appears if a link leads to it."""
    base = tmp_path_factory.mktemp("links")
    root = base / "set"
    for number, folder in enumerate((*FOLDERS, "../outside", "../outside/inner")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{number}.jpg").write_bytes(encoded(number))
    for place, target in links.items():
        (root / place / "link").symlink_to((root / target).resolve())
    problems = Problems()
    listing = FolderListing(root, problems)
    found = [path for top in listing.folders for path in listing.images(top)]
    own = [f"{folder}/{number}.jpg" for number, folder in enumerate(FOLDERS)]
    real = Counter(os.path.realpath(root / path) for path in found)
    assert set(own) <= set(found) and max(real.values()) == 1
    outside = {str(path.resolve()) for path in (base / "outside").rglob("*.jpg")}
    led_to = {target for target in links.values() if "outside" in target}
    if "../outside" in led_to:
        assert set(real) >= outside
    assert bool(led_to) == bool(set(real) & outside) and set(real) <= outside | {str(root / path) for path in own}
    followed = len({path.rpartition("link/")[0] for path in found if "link/" in path})
    # a real folder outside that another link has led to is counted as well
    assert 0 <= problems.skipped.total() + followed - len(links) <= 1
    assert all(kind.startswith("link ") for kind in problems.skipped)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["", *FOLDERS]), st.sampled_from([13, 5, 2]))
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path_factory, folder, number):
    root = tmp_path_factory.mktemp("unlistable")
    for place in FOLDERS:
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "1.jpg").write_bytes(encoded(1))
    scandir = os.scandir

    def refusing(path):
        if Path(path) == root / folder:
            raise OSError(number, os.strerror(number))
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        with pytest.raises(DataError, match=f"folder .*{folder} can't be listed .{os.strerror(number)}.*images would"):
            ImageFolderSource(root)


SPLITS = [  # folders in the root -> the folder that is read, or what the refusal gives instead
    (("train", "val"), "train"), (("train", "test", "valid", "validation"), "train"), (("train",), "train"),
    (("train", "val", ".cache", "__MACOSX"), "train"),
    (("train", "val", "samples"), "{}/train for that split, or {}/. if these folders are the classes"),
    (("Train", "Val"), "{}/Train for"), (("TRAIN", "val"), "{}/TRAIN for"), (("val", "test"), "{}/test for"),
    (("train2017", "val2017"), "{}/train2017 for"), (("training_set", "test-set"), "{}/training_set for"),
    (("imagenet",), "{}/imagenet if the folders in it are the classes, or {}/. if it is the only class"),
    (("trainer", "valley"), "."), (("train station", "testudo"), "."),
]  # fmt: skip


@pytest.mark.parametrize(("folders", "expected"), SPLITS, ids=lambda value: " ".join(value) if len(value) < 5 else None)
def test_a_split_is_never_guessed(tmp_path, folders, expected):
    root = tmp_path / "set"
    for folder in folders:
        class_folders(root / folder, 3)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root, "set")
    if len(expected) > 8:
        with pytest.raises(DataError) as caught:
            ImageFolderSource(root)
        assert expected.replace("{}", str(root)) in str(caught.value)
        with pytest.raises(DataError) as caught:
            TarImages(tmp_path / "a.tar", "set")
        assert expected.replace("{}/", "--split set/") in str(caught.value)
    else:
        classes = sorted(folders) if expected == "." else ["a", "b", "c"]
        folder, tar = ImageFolderSource(root), TarImages(tmp_path / "a.tar", "set")
        assert folder.root == root / expected and folder.classes == tar.classes == classes
        chosen = "the only one of the splits there that is read"
        assert (chosen in folder.summary()) == (chosen in tar.summary()) == (expected == "train")
    shown = sorted(folder for folder in folders if junk(folder) is None)
    assert ImageFolderSource(f"{root}/.").classes == TarImages(tmp_path / "a.tar", "set/.").classes == shown


def test_splits_inside_a_split_are_never_classes(tmp_path):
    root = tmp_path / "set"
    for folder in ("train/train", "train/val", "val/train", "val/val"):
        class_folders(root / folder, 3)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root, "set")
    with pytest.raises(DataError, match=f"holds splits itself .train, val.; give {root}/train/train for one of them"):
        ImageFolderSource(root)
    with pytest.raises(DataError, match="holds splits itself .train, val.; give --split set/train/train"):
        TarImages(tmp_path / "a.tar", "set")
    assert ImageFolderSource(f"{root}/train/.").classes == ["train", "val"]


def test_a_class_may_be_called_like_a_split(tmp_path):
    for folder in ("train/train", "train/car", "val/train", "val/car"):
        class_folders(tmp_path / folder, 1)
    assert ImageFolderSource(tmp_path).classes == ["car", "train"]


def test_a_class_without_images_is_refused(tmp_path):
    root = class_folders(tmp_path / "set", 6)
    (root / "d").mkdir()
    (root / "d" / "1.heic").write_bytes(b"x")
    (root / "top.jpg").write_bytes(encoded(1))
    tar = tar_of(root, tmp_path / "a.tar")
    for make in (lambda: ImageFolderSource(root), lambda: TarImages(tar)):
        with pytest.raises(DataError, match=r"class folder .*d holds no image .*passed over: 1 x .heic.*; drop it, or"):
            make()
    (root / "d" / "1.heic").rename(root / "1.heic")
    (root / "d").rmdir()
    tar = tar_of(root, tmp_path / "a.tar")
    for source in (ImageFolderSource(root), TarImages(tar)):
        assert source.problems().counts == {"no class": 1} and source.num_samples == 6
        assert source.problems().passed_over() == "1 x .heic"


def test_a_real_class_wins_over_a_link_to_it(tmp_path):
    root = class_folders(tmp_path / "set", 6)
    (root / "0").symlink_to("a")
    (root / "all").symlink_to(".")
    source = ImageFolderSource(root)
    assert source.classes == ["a", "b", "c"] and source.num_samples == 6
    assert source.problems().skipped.total() == 2 and "link 0 to a folder" in source.problems().passed_over()


FORMATS = {
    "JPEG": "jpg jpeg jpe jfif", "PNG": "png apng", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm pgm pbm pnm",
    "TIFF": "tif tiff", "GIF": "gif", "JPEG2000": "jp2 j2k j2c jpx", "AVIF": "avif",
}  # fmt: skip


@pytest.mark.parametrize("suffix", sorted(image_suffixes() - {"pfm"}))
def test_every_format_is_read(tmp_path, suffix):
    """Folders, tars and shards read the first frame of each format that Pillow decodes."""
    kind = {"pbm": "1", "pgm": "L"}.get(suffix, "RGB")
    pixels = np.full((8, 9, 3), (200, 200, 200) if kind != "RGB" else (200, 30, 90), np.uint8)
    frames = [Image.fromarray(array).convert(kind) for array in (pixels, 255 - pixels)]
    stream = io.BytesIO()
    name = next(name for name, suffixes in FORMATS.items() if suffix in suffixes.split())
    assert name in formats()
    many = {"save_all": True, "append_images": frames[1:]} if name in ("GIF", "TIFF", "WEBP", "AVIF") else {}
    frames[0].save(stream, name, **many)
    data = stream.getvalue()
    expected = np.asarray(frames[0].convert("RGB"), np.int64)
    assert np.abs(decode(data).astype(np.int64) - expected).max() <= 12
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / f"1.{suffix.upper()}").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "set" / "a", "a")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        tar.add(tmp_path / "set" / "a", ".")
    for source in (
        ImageFolderSource(tmp_path / "set"),
        TarImages(tmp_path / "a.tar"),
        ShardSource(expand(tmp_path / "shards")),
    ):
        assert source.num_samples == 1 and source.read(0) == data and not source.problems().passed_over()
    assert make_shards(FolderImages(tmp_path / "set"), tmp_path / "to").num_samples == 1
    assert len(read_manifest(tmp_path / "to")) == 1


def test_what_this_pillow_lacks_is_another_image(monkeypatch):
    monkeypatch.setattr("ijepa_scale.data.formats.image_suffixes", lambda: frozenset({"jpg"}))
    assert is_other_image("1.AVIF") and is_other_image("a.jp2") and not is_other_image("1.jpg")
    assert not is_image("1.avif") and not is_other_image("avif") and not is_other_image("a.txt")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("1.jpg", None),
        ("jpg", None),
        ("a.b", None),
        (".jpg", ".jpg"),
        (".a.jpg", ".*.jpg"),
        ("LOST+FOUND", "LOST+FOUND"),
    ],
)
def test_junk(name, kind):
    assert junk(name) == kind and junk_in(f"./{name}") == kind and junk_in(f"a/{name}/b.jpg") == kind


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.TXT", ".txt"),
        ("a", "no suffix"),
        ("a.b c", "no suffix"),
        ("a.", "no suffix"),
        ("a.0123456789abc", "no suffix"),
    ],
)
def test_suffixes(name, suffix):
    assert suffix_of(name) == suffix


def test_only_the_split_that_is_read_is_counted(tmp_path):
    for split, extra in (("train", ["a/.DS_Store"]), ("val", ["a/.DS_Store", "b/._x.jpg", "c/1.heic", "c/0.txt"])):
        class_folders(tmp_path / "set" / split, 3)
        for name in extra:
            (tmp_path / "set" / split / name).write_bytes(b"x")
        (tmp_path / "set" / split / "a" / "0.jpg").touch()
    tar = tar_of(tmp_path / "set", tmp_path / "a.tar")
    assert ImageFolderSource(tmp_path / "set").problems().passed_over() == "1 x .DS_Store"
    problems = TarImages(tar).problems()
    assert problems.passed_over() == "1 x .DS_Store" and problems.counts == {"image size": 1}


def test_names_of_any_bytes(tmp_path):
    root = tmp_path / "set"
    for number, name in enumerate(("a/\udcff.jpg", "\udcfe/1.jpg", "\udcfe/$x^_ .png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root, ".")
    folder, tar = ImageFolderSource(root), TarImages(tmp_path / "a.tar")
    assert folder.classes == tar.classes == ["a", "\udcfe"] and folder.labels().tolist() == [0, 1, 1]
    assert [folder.read(n) for n in range(3)] == [tar.read(n) for n in range(3)] == [encoded(n) for n in (0, 2, 1)]


def test_a_remote_folder_lists_no_junk(monkeypatch):
    rows = [{"name": name, "bytes": 1, "sha256": "0"} for name in ("1.tar", "._0.tar", "0.tar")]
    monkeypatch.setattr(remote, "_text", lambda url, cache: json.dumps({"shards": rows}).encode())
    found = remote.list_remote("https://host/folder", cast(FileCache, None))
    assert [file.url for file in found] == ["https://host/folder/0.tar", "https://host/folder/1.tar"]


def test_shards_count_what_they_pass_over(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.jpg", "1.cls", "1.txt", "1.heic", "._1.jpg", "__MACOSX/1.jpg", ".git/2.jpg", "1.json"):
            info = tarfile.TarInfo(name)
            content = {"cls": b"3", "json": b"{}"}.get(name[2:], encoded(1))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "._0.tar").write_bytes(b"\0\5\26\7")
    for _ in range(2):  # scanned, then from the index
        source = ShardSource(expand(tmp_path))
        assert source.num_samples == 1 and source.label(0) == 3 and not source.problems().counts
        assert source.problems().unread == {".heic": 1}
        assert source.problems().skipped == {".txt": 1, "._*": 1, "__MACOSX": 1, ".git": 1}

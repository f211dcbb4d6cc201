"""Folders, tars and ZIP archives without classes: what they are read as, and what is said about it."""

import logging
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.data.shards.image_files import CsvImages, FolderImages
from ijepa_scale.data.shards.make import make_shards
from ijepa_scale.data.shards.tars import TarImages
from ijepa_scale.data.shards.zips import ZipImages
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.data.sources.source import check_problems
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.class_lists import compare_classes
from ijepa_scale.evaluate.classification import check_labels
from tests.unit.data.shards.image_sets import class_folders, encoded, tar_of, zip_of

PLACES = ("", "2023/", "2023/12/", "2024-01-05 Ümea/", "2024-01-05 Ümea/\udcff/", ".cache/", "__MACOSX/")
FILES = ("1.jpg", "IMG 2.JPEG", "é.png", "\udcfe.webp", "clip.MOV", "Thumbs.db", "raw.heic")
photos = st.sets(st.tuples(st.sampled_from(PLACES), st.sampled_from(FILES)), max_size=14)


def write(root, entries):
    """Writes files, among them always some images, and returns the paths of those that are read."""
    images = []
    for number, (place, file) in enumerate(sorted({*entries, ("", "0.jpg"), ("", "00.jpg")})):
        path = os.path.join(root, place, file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(encoded(number))
        if file not in ("clip.MOV", "Thumbs.db", "raw.heic") and place not in (".cache/", "__MACOSX/"):
            images.append(place + file)
    return images


def archives_of(root, to):
    with tarfile.open(to / "a.tar", "w") as tar:
        tar.add(root, ".")
    return to / "a.tar", zip_of(root, to / "a.zip")


@settings(max_examples=40, deadline=None)
@given(photos)
def test_folder_tar_zip_and_shards_of_photos_agree(tmp_path_factory, entries):
    tmp_path = tmp_path_factory.mktemp("photos")
    root = tmp_path / "set"
    images = write(root, entries)
    tar, zipped = archives_of(root, tmp_path)
    sources = [
        FolderImages(root, most_loose=0.001),
        TarImages(tar, most_loose=0.001),
        ZipImages(zipped, most_loose=0.001),
        FolderImages(root, "**"),
        TarImages(tar, "**"),
        ZipImages(zipped, "**"),
    ]
    places = [path.rpartition("/")[::2] for path in images]
    expected = [os.path.join(*path) for path in sorted(places, key=lambda p: (p[0].partition("/")[0], p[0], p[1]))]
    for source in sources:
        base = f"{root}/" if isinstance(source, FolderImages) else source.name(0).partition(":")[0] + ":"
        assert [source.name(n).removeprefix(base) for n in range(source.num_samples)] == expected
        assert source.classes is None and source.labels().tolist() == [-1] * len(images) and source.label(0) == -1
        assert source.summary().startswith(f"{len(images)} images without labels in ")
        assert not source.problems().counts
        assert source.problems().unread == sources[0].problems().unread
        assert source.problems().skipped == sources[0].problems().skipped
        assert [source.read(n) for n in range(len(images))] == [sources[0].read(n) for n in range(len(images))]
    assert len({source.fingerprint for source in (sources[0], sources[3])}) == 1
    mixed = any(place for place, _ in places)
    assert [len(source.problems().doubts) for source in sources] == [int(mixed)] * 3 + [0] * 3
    assert len(ImageFolderSource(f"{root}/**").labels()) == len(images)
    made = [make_shards(source, tmp_path / str(n)) for n, source in enumerate(sources[:3])]
    assert {result.num_samples for result in made} == {len(images)}
    shards = [ShardSource(expand(tmp_path / str(n))) for n in range(3)]
    assert all((one.labels() == -1).all() and one.classes is None for one in shards)
    assert len({tuple(one.read(n) for n in range(len(images))) for one in shards}) == 1


@pytest.mark.parametrize(("loose", "inside", "limit", "labelled"), [
    (1, 999, 0.001, True), (1, 998, 0.001, False), (1, 9, 0.1, True), (2, 9, 0.1, False), (0, 3, 0.0, True),
    (1, 3, 0.0, False), (3, 0, 1.0, False), (5, 1, 1.0, True),
])  # fmt: skip
def test_images_in_no_folder_are_bad_data_up_to_the_limit(tmp_path, loose, inside, limit, labelled):
    """Up to the share that may be bad, classes and numbers stay as they were; above it there are no classes."""
    for number in range(inside):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "set").mkdir(exist_ok=True)
    for number in range(loose):
        (tmp_path / "set" / f"loose{number}.jpg").touch()
    source = ImageFolderSource(tmp_path / "set", most_loose=limit)
    assert (source.classes is not None) == labelled
    assert source.num_samples == inside + loose * (not labelled)
    assert source.problems().counts == ({"no class": loose} if labelled and loose else {})
    if labelled:
        check_problems(source.problems(), source.num_samples, max(limit, loose / (loose + inside)))
        assert f"in {min(2, inside)} class folder" in source.summary()
    elif inside:
        text = f"without labels, because it has images in no folder .{loose} of {loose + inside}.; give .*/set/. if"
        with pytest.raises(DataError, match=text):
            raise DataError(*source.problems().doubts)
        assert f"; {loose} of them in no folder" in source.summary()


def test_what_a_folder_was_read_as_is_said(tmp_path, caplog):
    root = class_folders(tmp_path / "set", 6)
    (root / "top.jpg").write_bytes(encoded(1))
    with caplog.at_level(logging.WARNING):
        check_problems(build_source("imagefolder", root).problems(), 7, 0.001, log=False)
        assert not caplog.messages
        check_problems(build_source("imagefolder", root).problems(), 7, 0.001)
    assert caplog.messages == [
        f"folder {root} is read without labels, because it has images in no folder (1 of 7); give {root}/. if its "
        "folders are the classes"
    ]
    sure = ImageFolderSource(f"{root}/.")
    assert sure.classes == ["a", "b", "c"] and sure.problems().counts == {"no class": 1} and not sure.problems().doubts


def test_a_split_may_be_without_labels(tmp_path):
    root = tmp_path / "set"
    for name in ("train/1.jpg", "train/2.jpg", "val/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(len(name)))
    for source in (ImageFolderSource(root), TarImages(tar_of(root, tmp_path / "a.tar"))):
        assert source.num_samples == 2 and source.classes is None
        assert source.summary().endswith("the only one of the splits there that is read")
    assert ImageFolderSource(f"{root}/**").num_samples == 3
    (root / "Sea").mkdir()
    (root / "Sea" / "1.jpg").write_bytes(encoded(1))
    for make, give in ((ImageFolderSource, f"{root}/"), (lambda _: TarImages(tmp_path / "b.tar"), "--split ")):
        tar_of(root, tmp_path / "b.tar")
        with pytest.raises(DataError) as caught:
            make(root)
        assert f"or {give}. if these folders are the classes, or {give}** to read all images without" in str(
            caught.value
        )
    (root / "train" / "old").mkdir()
    assert FolderImages(root, "train").num_samples == FolderImages(root, "train/**").num_samples == 2


def test_refusals_say_how_to_read_all_images(tmp_path):
    root = tmp_path / "photos"
    (root / "2023" / "12").mkdir(parents=True)
    (root / "2023" / "12" / "1.jpg").write_bytes(encoded(1))
    with pytest.raises(DataError, match=rf"if it is the only class, or {root}/\*\* to read all images without labels"):
        ImageFolderSource(root)
    (root / "videos").mkdir()
    with pytest.raises(DataError, match=rf"videos holds no image .*, or {root}/\*\* to read all images without labels"):
        ImageFolderSource(root)
    assert ImageFolderSource(f"{root}/**").num_samples == 1
    assert ImageFolderSource(f"{root}/**/").num_samples == 1  # as a shell completes it


def test_folders_with_little_in_them(tmp_path, monkeypatch):
    for ending in ("", "/.", "/**"):
        with pytest.raises(DataError, match="set holds no class folders and no images outside them; give the folder"):
            (tmp_path / "set").mkdir(exist_ok=True)
            ImageFolderSource(f"{tmp_path}/set{ending}")
        with pytest.raises(DataError, match="folder .*/none doesn't exist .*, or a folder of images without classes"):
            ImageFolderSource(f"{tmp_path}/none{ending}")
    (tmp_path / "set" / "1.heic").touch()
    with pytest.raises(DataError, match=r"no images outside them .1 x .heic"):
        ImageFolderSource(tmp_path / "set")
    (tmp_path / "set" / "1.jpg").write_bytes(encoded(1))
    assert ImageFolderSource(tmp_path / "set").num_samples == 1
    with pytest.raises(DataError, match=r"holds no class folders .*1 x no class; the first is .*/1.jpg"):
        ImageFolderSource(f"{tmp_path}/set/.")
    monkeypatch.chdir(tmp_path / "set")
    assert ImageFolderSource(".").labels().tolist() == ImageFolderSource("**").labels().tolist() == [-1]


def test_a_link_to_nothing_costs_no_unlabelled_set(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (root / "1.jpg").write_bytes(encoded(1))
    (root / "album").symlink_to("nowhere")
    (root / "old.zip").write_bytes(b"x")
    source = ImageFolderSource(root)
    assert source.num_samples == 1 and not source.problems().doubts
    assert source.problems().skipped == {"no suffix": 1, ".zip": 1}


def test_whoever_needs_labels_says_that_there_are_none(tmp_path):
    labelled = ImageFolderSource(class_folders(tmp_path / "set", 6))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.jpg").write_bytes(encoded(1))
    flat = ImageFolderSource(tmp_path / "flat")
    text = (
        r"data: 1 of 1 images have no label .* it was read as 1 image without labels in folder .*/flat; give class fol"
    )
    for log in (True, False):
        for pair in ((("train", labelled), ("data", flat)), (("data", flat), ("test", labelled))):
            with pytest.raises(DataError, match=text):
                compare_classes(*pair, log=log)
    with pytest.raises(DataError, match=text):
        check_labels(flat, 3, "data")


paths = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & set(b"\n\r\0") and name.strip() != b"")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(paths.map(lambda name: name + b".jpg"), min_size=1, max_size=5), st.sampled_from([b"\n", b"\r\n", b"\n\n"])
)
def test_a_line_is_a_path_whatever_its_bytes(tmp_path_factory, names, end):
    tmp_path = tmp_path_factory.mktemp("list")
    names[0] = b"first" + names[0]  # else a byte order mark may begin it
    (tmp_path / "l").write_bytes(end.join(names))
    source = build_source("list", tmp_path / "l")
    assert [os.fsencode(source.name(n)) for n in range(source.num_samples)] == [
        os.fsencode(tmp_path / os.fsdecode(name)) for name in names
    ]


@pytest.mark.parametrize("name", ["list.txt", "list", "list.csv"])
def test_a_list_of_paths(tmp_path, name):
    (tmp_path / "a b").mkdir()
    names = ["a b/1 x.jpg", "ü.png", "gone.jpg", str(tmp_path / "a b" / "2.jpg")]
    for number, path in enumerate(names):
        if path != "gone.jpg":
            (tmp_path / path).write_bytes(encoded(number))
    lines = (["path"] if name.endswith("csv") else []) + names
    (tmp_path / name).write_bytes("\r\n".join([*lines, "", ""]).encode())
    source = build_source("list", tmp_path / name)
    assert source.num_samples == 4 and source.labels().tolist() == [-1] * 4 and source.classes is None
    assert [source.read(n) for n in (0, 1, 3)] == [encoded(n) for n in (0, 1, 3)]
    assert source.summary() == f"4 images without labels in {tmp_path / name}"
    result = make_shards(source, tmp_path / "to", max_bad_fraction=0.5)
    assert result.left_out == {"missing file": 1} and ShardSource(expand(tmp_path / "to")).labels().tolist() == [-1] * 3


def test_a_list_may_have_labels_or_any_bytes(tmp_path):
    (tmp_path / "\udcff.jpg").write_bytes(encoded(1))
    (tmp_path / "1.jpg").write_bytes(encoded(2))
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf\xff.jpg\n1.jpg")
    assert build_source("list", tmp_path / "l.txt").read(0) == encoded(1)
    (tmp_path / "l.CSV").write_text("path,label\n1.jpg,dog\n1.jpg,dog\n")
    source = build_source("list", tmp_path / "l.CSV")
    assert source.classes == ["dog"] and source.labels().tolist() == [0, 0]
    (tmp_path / "l.lst").write_text("path,label\n1.jpg,dog\n")
    assert CsvImages(tmp_path / "l.lst").classes == ["dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"", "names no images; write one path per line"),
        ("l.txt", b"\n \r\n", "names no images"),
        ("l.txt", b"path,label\na.jpg,1\n", "begins like a CSV file .'path,label'.; give it a name that ends in .csv"),
        ("l.txt", b"a.jpg\nb c.JPG 17\n", "line 2: 'b c.JPG 17' has something after the path; write a CSV"),
        ("l.txt", b"a.jpg\ta\n", "line 1: .* has something after the path"),
        ("l.txt", "a.jpg\n".encode("utf-16"), "isn't a text in UTF-8; save it as one"),
        ("l.txt", None, "can't be read .No such file.*; give a text file with one path per line, or a .csv"),
        ("l.csv", b"path\n", "lists no images; add lines with path"),
        ("l.csv", b"path,lable\na.jpg,1\n", r"must name columns path and label, or path alone if the images have no"),
        ("l.csv", b"path\na.jpg,1\n", "has 2 cells, the first line 1"),
        ("l.csv", b"path,label\na.jpg,\n", "lacks a path or a label"),
    ],
)
def test_lists_with_mistakes(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_source("list", tmp_path / name)

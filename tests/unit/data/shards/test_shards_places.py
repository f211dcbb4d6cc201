"""What stands in a class's place but is no class: links and archives are never lost in silence, nor shift numbers."""

import io
import logging
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.make import make_shards
from ijepa_scale.data.shards.tars import TarImages
from ijepa_scale.data.shards.zips import ZipImages
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.listing import images_below
from ijepa_scale.data.sources.source import check_problems
from ijepa_scale.errors import DataError
from tests.unit.data.shards.image_sets import add, class_folders, encoded, tar_of_tars, zip_of

INSIDE = ("a", "./b/../c", ".", "..", "a/deep", "other")  # "other" is itself a link in some trees
NOTHING = ("nowhere", "a/nothing", "itself", "/nowhere/at/all")
FILES = ("a/first.jpg", "labels.txt")
ARCHIVES = ("d.tar.gz", "D.TGZ", "e.zip", "f.7z", "n01.tar.xz", "g.rar")
NAMES = ("link", "Other", "0", "z z", "ü")


def write(root, links, files, target_of_other=None):
    class_folders(root, 6)
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "1.jpg").write_bytes(encoded(9))
    (root / "a" / "first.jpg").write_bytes(encoded(10))
    (root / "labels.txt").write_text("text")
    if target_of_other is not None:
        (root / "other").symlink_to(target_of_other)
    for name, target in links.items():
        (root / name).symlink_to(target)
    for name in files:
        (root / name).write_bytes(b"archive")


def archives(root, to):
    with tarfile.open(to / "a.tar", "w") as tar:
        tar.add(root, ".")
    return to / "a.tar", zip_of(root, to / "a.zip")


def readings(root, to):
    """Returns what folder, tar and ZIP archive read, or why they refuse."""
    tar, zipped = archives(root, to)
    found = []
    for make in (lambda: FolderImages(root), lambda: TarImages(tar), lambda: ZipImages(zipped)):
        try:
            source = make()
            names = [source.name(n).rpartition(":")[2].removeprefix(f"{root}/") for n in range(source.num_samples)]
            doubts = [doubt.replace(f"{tar}:", f"{root}/").replace(f"{zipped}:", f"{root}/") for doubt in (
                source.problems().doubts)]  # fmt: skip
            assert not source.problems().counts
            found.append((source.classes, names, source.labels().tolist(), doubts, source.problems().skipped))
        except DataError as error:
            text = str(error).replace(f"{tar}:", f"{root}/").replace(f"{zipped}:", f"{root}/")
            found.append(text.partition(" leads")[0])
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(INSIDE[:-1] + FILES), max_size=4),
    st.sets(st.sampled_from(ARCHIVES), max_size=3),
    st.sampled_from(["a", "b/.", "./c", ".", "a/deep"]),
)
def test_links_and_archives_are_left_out_alike_and_named(tmp_path_factory, links, files, target):
    tmp_path = tmp_path_factory.mktemp("places")
    root = tmp_path / "top" / "set"
    write(root, {**links, "second": "other"}, files, target)
    folder, *others = readings(root, tmp_path)
    assert others == [folder, folder]
    classes, names, labels, doubts, skipped = folder
    assert classes == ["a", "b", "c"] and len(names) == 8 and sorted(set(labels)) == [0, 1, 2]
    into = {name: to for name, to in links.items() if to not in FILES} | {"other": target, "second": "other"}
    assert len(doubts) == len(into) + len(files)
    for name in into:
        assert any(doubt.startswith(f"link {root}/{name} is in a class's place, but leads") for doubt in doubts)
        assert skipped[f"link {name} to a folder that is listed anyway"] == 1
    for name in files:
        assert any(doubt.startswith(f"archive {root}/{name} is in a class's place and isn't") for doubt in doubts)


@pytest.mark.parametrize("target", NOTHING)
def test_a_link_to_nothing_is_refused_alike(tmp_path, target):
    root = tmp_path / "top" / "set"
    write(root, {"itself": target}, [])
    assert readings(root, tmp_path) == [f"link {root}/itself"] * 3


def test_a_link_out_of_the_set(tmp_path):
    """A folder reader follows it; an archive lacks what it leads to, so it is refused with the way to write it."""
    class_folders(tmp_path / "outside", 1, ("x",))
    root = tmp_path / "set"
    write(root, {"n05": "../outside/x"}, [])
    tar, zipped = archives(root, tmp_path)
    assert FolderImages(root).classes == ["a", "b", "c", "n05"]
    for make, remedy in (
        (lambda: TarImages(tar), "tar --dereference"),
        (lambda: ZipImages(zipped), "without --symlinks"),
    ):
        with pytest.raises(DataError, match=f"n05 leads to nothing in the archive, so a class may be.*{remedy}"):
            make()
    os.replace(root / "n05", root / "a" / "n05")
    for source in (TarImages(archives(root, tmp_path)[0]), ZipImages(zipped)):
        assert source.classes == ["a", "b", "c"] and source.problems().counts == {"link or device": 1}


def test_what_may_be_a_class_is_said_when_shards_are_made_and_when_a_run_starts(tmp_path, caplog):
    root = class_folders(tmp_path / "set", 6)
    (root / "0").symlink_to("a")
    (root / "d.tar.gz").write_bytes(b"archive")
    expected = [f"link {root}/0 is in a class's place", f"archive {root}/d.tar.gz is in a class's place"]
    with caplog.at_level(logging.WARNING):
        make_shards(FolderImages(root), tmp_path / "to")
        check_problems(ImageFolderSource(root).problems(), 6, 0.001)
    assert len(caplog.messages) == 4
    assert all(said.startswith(begin) for said, begin in zip(caplog.messages, expected * 2, strict=True))
    caplog.clear()
    check_problems(ImageFolderSource(root).problems(), 6, 0.001, log=False)
    assert not caplog.messages


def test_inner_tars_in_any_case_are_classes(tmp_path):
    root = class_folders(tmp_path / "set", 6)
    content = tar_of_tars(root, tmp_path / "a.tar").read_bytes()
    expected = TarImages(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(content.replace(b"b.tar\0", b"b.TAR\0"))
    with tarfile.open(tmp_path / "a.tar") as old, tarfile.open(tmp_path / "c.tar", "w") as new:
        for member in old:
            data = old.extractfile(member).read()
            add(new, member.name.replace(".tar", ".Tar"), data)
    source = TarImages(tmp_path / "c.tar")
    assert source.classes == expected.classes == ["a", "b", "c"]
    assert [source.read(n) for n in range(6)] == [expected.read(n) for n in range(6)]
    with tarfile.open(tmp_path / "c.tar", "a") as new:
        add(new, "b.tar", data)
    with pytest.raises(DataError, match="c.tar holds b.Tar and b.tar, which would be one class; rename one"):
        TarImages(tmp_path / "c.tar")


def test_links_to_inner_tars_and_devices(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as inner:
        add(inner, "1.jpg", encoded(1))
    for target, kind in (("n01.tar", tarfile.SYMTYPE), ("gone.tar", tarfile.SYMTYPE), ("n01.tar", tarfile.LNKTYPE)):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "n01.tar", stream.getvalue())
            info = tarfile.TarInfo("n02.tar")
            info.type, info.linkname = kind, target
            tar.addfile(info)
        if target == "gone.tar":
            with pytest.raises(DataError, match="n02.tar leads to nothing in the archive"):
                TarImages(tmp_path / "a.tar")
            continue
        source = TarImages(tmp_path / "a.tar")
        assert source.classes == ["n01"] and len(source.problems().doubts) == 1
        assert source.problems().counts == ({"link or device": 1} if kind == tarfile.LNKTYPE else {})


def test_a_link_around_the_split(tmp_path):
    root = class_folders(tmp_path / "top" / "set" / "train", 6)
    (root / "up").symlink_to("..")
    tar, zipped = archives(tmp_path / "top", tmp_path)
    for source in (FolderImages(root), TarImages(tar, "set/train"), ZipImages(zipped, "set/train")):
        assert source.classes == ["a", "b", "c"] and len(source.problems().doubts) == 1


def test_links_inside_classes(tmp_path):
    root = class_folders(tmp_path / "set", 6)
    (root / "a" / "up").symlink_to("..")
    (root / "b" / "note").symlink_to("../a/0.txt")
    (root / "a" / "0.txt").write_text("text")
    tar, zipped = archives(root, tmp_path)
    for source in (FolderImages(root), TarImages(tar), ZipImages(zipped)):
        assert source.num_samples == 6 and not source.problems().doubts and not source.problems().counts
        assert source.problems().skipped == {
            "link a/up to a folder that is listed anyway": 1, ".txt": 1, "no suffix": 1
        }  # fmt: skip


@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_in_a_classs_place_that_leads_to_nothing_is_an_error(tmp_path, target):
    class_folders(tmp_path, 1)
    (tmp_path / "itself").symlink_to(target)
    with pytest.raises(DataError, match="link .*/itself leads to nothing, so a class may be missing"):
        ImageFolderSource(tmp_path)
    assert images_below(str(tmp_path))[0]  # prediction needs no classes

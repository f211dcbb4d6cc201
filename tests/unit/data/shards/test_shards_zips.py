"""ZIP archives: the same shards as from the folder, and no member that costs more than itself."""

import os
import pickle
import random
import struct
import tracemalloc
import zipfile

import pytest

from ijepa_scale.data.shards import zips
from ijepa_scale.data.shards.command_line import open_images
from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.make import MakePlan, make_shards
from ijepa_scale.data.shards.zips import ZipImages
from ijepa_scale.errors import DataError, SampleError
from tests.unit.data.shards.image_sets import class_folders, encoded, tree, zip_of

PLAN = MakePlan(shard_bytes=3000)


def images_of(source):
    return [(source.read(n), source.label(n)) for n in range(source.num_samples)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_zip_makes_the_shards_of_its_folder(tmp_path, workers):
    root = class_folders(tmp_path / "set", 20)
    make_shards(FolderImages(root), tmp_path / "1", plan=PLAN)
    source = open_images("zip", str(zip_of(root, tmp_path / "a.zip")))
    assert source.summary() == f"20 images in 3 classes of {tmp_path / 'a.zip'}"
    make_shards(source, tmp_path / "2", plan=PLAN, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert images_of(pickle.loads(pickle.dumps(source))) == images_of(source)


def test_splits_are_those_of_folders(tmp_path):
    for split, count in (("train", 6), ("val", 4)):
        class_folders(tmp_path / "set" / split, count)
    path = zip_of(tmp_path / "set", tmp_path / "a.zip", "imagenet/")
    with pytest.raises(DataError, match="are in its folder 'imagenet'; give --split imagenet if .* --split . if it"):
        ZipImages(path)
    assert ZipImages(path, "imagenet").num_samples == 6 and ZipImages(path, "imagenet/val").num_samples == 4
    assert ZipImages(path, "**").labels().tolist() == [-1] * 10


def test_an_archive_after_other_bytes_is_read(tmp_path):
    """As self-extracting archives are: their offsets count from where the archive begins."""
    path = zip_of(class_folders(tmp_path / "set", 5), tmp_path / "a.zip")
    expected = images_of(ZipImages(path))
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" * 50 + path.read_bytes())
    assert images_of(ZipImages(tmp_path / "b.zip")) == expected


def member(name, kind=zipfile.ZIP_STORED, mode=0o100644):
    info = zipfile.ZipInfo(name)
    info.create_system, info.compress_type, info.external_attr = 3, kind, mode << 16
    return info


def test_members_that_cannot_be_used_are_left_out_and_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member("a/1.jpg"), encoded(1))
        archive.writestr(member("b/1.jpg", zipfile.ZIP_DEFLATED), encoded(2))
        for name in ("../up.jpg", "/abs.jpg", "a/../../b.png"):
            archive.writestr(member(name), encoded(3))
        archive.writestr(member("a/link.jpg", mode=0o120777), "/etc/passwd")
        archive.writestr(member("a/pipe.jpg", mode=0o010644), b"")
        archive.writestr(member("a/bzip.jpg", zipfile.ZIP_BZIP2), encoded(4))
        archive.writestr(member("b/lzma.jpg", zipfile.ZIP_LZMA), encoded(4))
        archive.writestr(member("b/empty.jpg"), b"")
        for name in ("a/note.txt", "a/._1.jpg", "__MACOSX/a/._1.jpg", ".hidden/2.jpg", "Thumbs.db", "b/1.HEIC"):
            archive.writestr(member(name), b"text")
        archive.writestr(member("lost.jpg"), encoded(5))
    source = ZipImages(tmp_path / "a.zip")
    assert images_of(source) == [(encoded(1), 0), (encoded(2), 1)] and source.classes == ["a", "b"]
    problems = source.problems()
    assert problems.counts == {
        "unsafe name": 3, "link or device": 2, "compression": 2, "image size": 1, "no class": 1
    }  # fmt: skip
    assert problems.unread == {".heic": 1}
    assert problems.skipped == {".txt": 1, "._*": 1, "__MACOSX": 1, ".hidden": 1, "Thumbs.db": 1}


def test_a_member_that_claims_too_much_is_left_out(tmp_path):
    """Neither a huge size nor a small one in front of much data makes a reader take more memory than an image may."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member("1.jpg"), encoded(1))
        archive.writestr(member("2.jpg", zipfile.ZIP_DEFLATED), bytes((64 << 20) + 1))
        archive.writestr(member("3.jpg", zipfile.ZIP_DEFLATED), bytes(32 << 20))
        archive.writestr(member("4.jpg"), bytes(range(256)) * 100)
    content = (tmp_path / "a.zip").read_bytes()
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"4.jpg"))
    content = content[: at + 24] + struct.pack("<I", 100) + content[at + 28 :]  # 4.jpg claims 100 bytes, has 25600
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"3.jpg"))
    content = content[: at + 24] + struct.pack("<I", 40_000) + content[at + 28 :]  # 3.jpg unpacks to more
    (tmp_path / "b.zip").write_bytes(content)
    source = ZipImages(tmp_path / "b.zip")
    assert source.problems().counts == {"image size": 2} and source.num_samples == 2
    tracemalloc.start()
    with pytest.raises(SampleError, match="doesn't match its size or checksum in the archive"):
        source.read(1)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20  # not the 32 MiB that it unpacks to
    tracemalloc.stop()


def test_encrypted_and_overlapping_archives_are_refused(tmp_path, monkeypatch):
    path = zip_of(class_folders(tmp_path / "set", 6), tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"locked.zip:\S+ is encrypted; write the archive without a password"):
        ZipImages(tmp_path / "locked.zip")
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", first + 1)
    third = content.index(b"PK\1\2", second + 1)
    content[third + 42 : third + 46] = content[second + 42 : second + 46]  # both at the same offset
    (tmp_path / "overlap.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"shares bytes with other members, as in archives made to exhaust a machine"):
        ZipImages(tmp_path / "overlap.zip")
    monkeypatch.setattr(zips, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="a.zip has over 3 members; write smaller archives"):
        ZipImages(path)
    monkeypatch.setattr(zips, "MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(DataError, match="a.zip isn't a readable zip .a list of members of .* bytes, at most 100"):
        ZipImages(path)


def test_what_is_no_whole_archive_is_refused(tmp_path):
    path = zip_of(class_folders(tmp_path / "set", 6), tmp_path / "a.zip")
    content = path.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    (tmp_path / "text.zip").write_bytes(b"no zip" * 200)
    (tmp_path / "empty.zip").touch()
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("cut.zip", "text.zip", "empty.zip", "missing.zip", "pipe.zip"):
        with pytest.raises(DataError, match=f"{name} isn't a readable zip .*; give a complete one"):
            ZipImages(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    with pytest.raises(DataError, match="none.zip holds no images in class folders, and none outside them"):
        ZipImages(tmp_path / "none.zip")


def test_an_archive_that_changes_is_reported(tmp_path):
    source = ZipImages(zip_of(class_folders(tmp_path / "set", 5), tmp_path / "a.zip"))
    os.utime(tmp_path / "a.zip", ns=(5, 5))
    with pytest.raises(DataError, match="a.zip has changed since it was listed; start again in an empty folder"):
        source.read(0)


@pytest.mark.parametrize("seed", range(60))
def test_damage_costs_one_line(tmp_path, seed):
    """Flipped and lost bytes: an error of one line, a bad member, or the images as they were; never anything else."""
    generator = random.Random(seed)
    path = zip_of(class_folders(tmp_path / "set", 8), tmp_path / "a.zip")
    source = ZipImages(path)
    whole = {source.read(n) for n in range(8)}
    content = bytearray(path.read_bytes())
    ends = len(content) - 900 if seed % 2 else 0  # half of them in the list of members
    for _ in range(generator.randrange(1, 4)):
        content[generator.randrange(ends, len(content))] ^= 1 << generator.randrange(8)
    if seed % 5 == 0:
        del content[generator.randrange(len(content)) :]
    path.write_bytes(content)
    try:
        source = ZipImages(path)
    except DataError as error:
        assert len(str(error).splitlines()) == 1
        return
    for n in range(source.num_samples):
        try:
            data = source.read(n)
        except SampleError as error:
            assert error.kind == "damaged member" and "\n" not in str(error)
        else:
            assert data in whole

"""Tar shards as they occur in practice: long names, links, damage, several processes at once."""

import contextlib
import io
import logging
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.data.sources import tar_index
from ijepa_scale.data.sources.scan import scan_tar
from ijepa_scale.data.sources.tar_index import Names, expand, index_path, index_tar, save_index, scan_index
from ijepa_scale.errors import DataError

IMAGE = b"\xff\xd8\xff" + bytes(range(200))


def make_tar(path, members, format=tarfile.GNU_FORMAT):
    """Writes a tar of members (name, bytes or TarInfo type)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1 or content == b"":
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "0.jpg"
                tar.addfile(info)
    return path


def contents_of(index):
    with index.path.open("rb") as file:
        return [os.pread(file.fileno(), int(s), int(o)) for o, s in zip(index.offsets, index.sizes, strict=True)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_labels_and_side_files(tmp_path, format):
    long = "train/" + "é" * 150
    members = [
        ("train", tarfile.DIRTYPE),
        ("train/._a.jpg", IMAGE),
        (f"{long}.jpg", IMAGE + b"1"),
        (f"{long}.cls", b"12"),
        ("b.cls", b" 7\n"),
        ("b.PNG", IMAGE + b"2"),
        ("c.webp", IMAGE + b"3"),
        ("c.json", b'{"label": 3, "caption": "x"}'),
        ("d.jpeg", IMAGE + b"4"),
        ("d.txt", b"caption"),
        ("e.json", b'{"label": 3}'),
        ("e.cls", b"05"),
        ("e.jpg", IMAGE + b"5"),
    ]
    index = index_tar(make_tar(tmp_path / "a.tar", members, format))
    assert list(index.keys) == [long, "b", "c", "d", "e"]
    assert index.labels.tolist() == [12, 7, 3, -1, 5]
    assert contents_of(index) == [IMAGE + b"%d" % n for n in range(1, 6)]


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ([("a.cls", b"12")], "no image", "no image .*; write it again"),
        ([("../a.jpg", IMAGE)], "unsafe name", "leaves its folder"),
        ([("/a.jpg", IMAGE)], "unsafe name", "leaves its folder"),
        ([("a.jpg", tarfile.SYMTYPE)], "link or device", "a link.*--dereference"),
        ([("a.jpg", tarfile.LNKTYPE), ("a.cls", b"12")], "link or device", "a link"),
        ([("a.cls", b"12"), ("a.jpg", tarfile.FIFOTYPE)], "link or device", "a link, a device"),
        (
            [("d.jpg", IMAGE), ("d.v2.jpg", IMAGE)],
            "several images",
            "its images are jpg, v2.jpg; choose .*image_member=jpg",
        ),
        ([("d.jpg", IMAGE), ("d.jpg", IMAGE)], "several images", "two members of this name"),
        ([("d.jpg", IMAGE), ("d.cls", b"12"), ("d.x.cls", b"12")], "several labels", "cls, x.cls; choose .*=cls"),
        ([("d.jpg", IMAGE), ("d.cls", b"12"), ("d.cls", b"13")], "several labels", "its labels are cls; choose"),
        ([("a.jpg", b"")], "member size", "0 bytes; give 1 to"),
        ([("a.jpg", IMAGE), ("a.cls", b"\xff\xfe")], "bad label", r"b'.xff.xfe' isn't a label; give a number or name"),
        ([("a.jpg", IMAGE), ("a.cls", b"  ")], "bad label", "isn't a label"),
        ([("a.jpg", IMAGE), ("a.cls", b"c" * 1001)], "bad label", "isn't a label"),
        ([("a.jpg", IMAGE), ("a.json", b'{"label": [3]}')], "bad label", "isn't a label"),
        ([("a.jpg", IMAGE), ("a.json", b'{"label": true}')], "bad label", "isn't a label"),
        ([("a.jpg", IMAGE), ("a.json", b'{"label": 1.5}')], "bad label", "isn't a label"),
        ([("a.json", b"[" * 9000), ("a.jpg", IMAGE)], "bad label", "isn't a label"),
        ([("a.jpg", IMAGE), ("a.cls", b"9" * 30)], "bad label", "isn't a label"),
        ([("a.jpg", IMAGE), ("a.cls", b"1" * (2 << 20))], "bad label", "a label has at most 1048576"),
    ],
)
def test_a_bad_member_costs_its_own_sample(tmp_path, members, kind, reason):
    path = make_tar(tmp_path / "a.tar", [("b.jpg", IMAGE), ("b.cls", b" 7"), *members, ("c.jpg", IMAGE)])
    for index in (index_tar(path), index_tar(path)):  # scanned, then loaded
        assert list(index.keys) == ["b", "c"] and index.labels.tolist() == [7, -1]
        assert dict(index.problems.counts) == {kind: 1}
        assert index.problems.named[0].kind == kind and re.search(reason, index.problems.named[0].reason)
    assert index_path(path).exists()


@pytest.mark.parametrize("members", [[], [(".hidden", b"text")], None])
def test_an_empty_shard_is_counted(tmp_path, members):
    path = tmp_path / "a.tar"
    path.touch() if members is None else make_tar(path, members)
    index = index_tar(path)
    assert len(index) == 0 and dict(index.problems.counts) == {"empty shard": 1}


def test_size_and_count_are_capped(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("b.jpg", IMAGE[:50])])
    monkeypatch.setattr("ijepa_scale.data.sources.scan.MAX_MEMBER_BYTES", 100)
    index = index_tar(path)
    assert list(index.keys) == ["b"] and dict(index.problems.counts) == {"member size": 1}
    assert index.problems.named[0].reason == "203 bytes; give 1 to 100 (64 MiB)"
    index_path(path).unlink()
    monkeypatch.setattr("ijepa_scale.data.sources.scan.MAX_MEMBERS", 1)
    with pytest.raises(DataError, match="over 1 members; write smaller shards"):
        index_tar(path)


def test_a_member_of_ten_gigabytes_costs_nothing(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, size in (("a.jpg", len(IMAGE)), ("b.jpg", 10 << 30), ("c.jpg", len(IMAGE))):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(IMAGE) if size < 1000 else None)
            if size > 1000:  # a sparse file, which uses no disk
                tar.fileobj.truncate(tar.fileobj.seek(tar.offset + size))
                tar.offset += size
    index = index_tar(path)
    assert list(index.keys) == ["a", "c"] and dict(index.problems.counts) == {"member size": 1}
    assert contents_of(index) == [IMAGE, IMAGE]


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("b" * 200 + ".jpg", IMAGE)])
    data = bytearray(path.read_bytes())
    name = data.index(b"././@LongLink")
    data[name + 124 : name + 136] = b"%011o\0" % (6 << 30)
    data[name + 148 : name + 156] = b" " * 8
    data[name + 148 : name + 156] = b"%06o\0 " % sum(data[name : name + 512])
    path.write_bytes(data)
    index = index_tar(path)
    assert len(index) == 0 and "a header of 6442450944 bytes" in index.problems.named[0].reason


def test_a_tar_cut_anywhere_keeps_whole_samples_only(tmp_path):
    members = [(f"{n}.{e}", IMAGE if e == "jpg" else b"1%d" % n) for n in range(3) for e in ("jpg", "cls")]
    whole = make_tar(tmp_path / "a.tar", members).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(256, 6 * 1024 + 1, 256):  # six members of 1024 bytes, then the end marker
        cut.write_bytes(whole[:length])
        if length < 512:
            with pytest.raises(DataError, match="isn't a readable tar"):
                index_tar(cut)
            continue
        index = index_tar(cut)
        assert index.labels.tolist() == [10, 11, 12][: len(index)] and len(index) <= length // 2048
        assert dict(index.problems.counts) == {"cut short": 1}
        assert contents_of(index) == [IMAGE] * len(index)
    cut.write_bytes(whole[:4096] + b"\x01" * 512 + whole[4608:])  # a damaged header in the middle
    index = index_tar(cut)
    assert "after byte 4096 (no end mark); copy or write it again" in index.problems.named[0].reason
    assert list(index.keys) == ["0"]  # the second sample may lack members that came after the damage


def test_missing_and_compressed_tars_are_refused(tmp_path):
    with pytest.raises(DataError, match="can't be read .No such file"):
        index_tar(tmp_path / "no.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="isn't a readable tar .*uncompressed"):
        index_tar(tmp_path / "z.tar")


def test_the_stored_index_is_used_until_the_tar_changes(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("a.cls", b"12")])
    first = index_tar(path)
    scans = []
    monkeypatch.setattr(
        "ijepa_scale.data.sources.tar_index.scan_tar",
        lambda path, members: scans.append(path) or scan_tar(path, members),
    )
    again = index_tar(path)
    assert not scans and list(again.keys) == ["a"] and again.labels.tolist() == [12]
    np.testing.assert_array_equal(first.offsets, again.offsets)
    make_tar(path, [("b.jpg", IMAGE), ("b.cls", b"13")])  # of the same size
    os.utime(path, ns=(1, 1))
    assert list(index_tar(path).keys) == ["b"] and len(scans) == 1
    kept = index_path(path).read_bytes()
    for damaged in (b"", b"text", kept[: len(kept) // 2], kept[:200] + b"\xff" * 50 + kept[250:]):
        index_path(path).write_bytes(damaged)
        assert list(index_tar(path).keys) == ["b"]
    assert len(scans) == 5


def test_an_index_that_points_outside_its_tar_is_scanned_again(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE)])
    index_tar(path)
    with np.load(index_path(path), allow_pickle=False) as arrays:
        columns = dict(arrays)
    for change in ({"offsets": np.array([10**9])}, {"sizes": np.array([-1])}, {"labels": np.array([1, 2])}):
        np.savez(index_path(path), **{**columns, **change})
        assert contents_of(index_tar(path)) == [IMAGE]


def test_many_at_once_agree_and_leave_one_file(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{n}.jpg", IMAGE) for n in range(50)])
    with ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(lambda _: index_tar(path), range(16)))
    assert {len(index) for index in indices} == {50}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar", "a.tar.idx.npz"]


def test_a_folder_that_cannot_be_written_costs_a_scan_only(tmp_path, monkeypatch, caplog):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE)])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for writes in ("os.open", "np.savez"):  # when the file is made, and when it is written
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"ijepa_scale.data.sources.tar_index.{writes}", refuse)
            save_index(scan_index(path, path.stat()), index_path(path))
        assert "can't be stored (Permission denied)" in caplog.text
        assert [found.name for found in tmp_path.iterdir()] == ["a.tar"]
    assert len(index_tar(path)) == 1


def test_a_folder_marked_read_only_is_left_alone(tmp_path, caplog):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE)])
    tmp_path.chmod(0o555)
    try:
        assert len(index_tar(path)) == 1  # even root, who could write there, doesn't
    finally:
        tmp_path.chmod(0o755)
    assert not index_path(path).exists() and "the folder is read-only" in caplog.text


def test_patterns(tmp_path):
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "t.tar", "note.txt"):
        (tmp_path / name).touch()

    def names(pattern):
        return [path.name for path in expand(f"{tmp_path}/{pattern}")]

    assert names("") == ["s-008.tar", "s-009.tar", "s-010.tar", "t.tar"]
    assert names("s-*.tar") == names("s-{008..010}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert names("{t,s-009}.tar") == ["s-009.tar", "t.tar"]
    assert names("{s-0{08..09},t}.tar".replace("{s-0{08..09},t}", "s-0{08..09}")) == ["s-008.tar", "s-009.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no-*.tar", "'.*no-.*' matches no file; name a folder of shards"),
        ("s-{000..002}.tar", "'.*s-001.tar' matches no file"),
        ("s-{5..2}.tar", "{5..2} in .* isn't a range"),
        ("empty", r"holds no \*\.tar file"),
    ],
)
def test_patterns_that_name_nothing(tmp_path, pattern, message):
    (tmp_path / "s-000.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        expand(tmp_path / pattern)


@pytest.mark.parametrize("pattern", ["pipe:cat a.tar", "https://example.org/{0..9}.tar", "s3://bucket/a.tar"])
def test_remote_patterns_are_refused(pattern):
    with pytest.raises(DataError, match="isn't a local path; .*copy the shards to a local folder"):
        expand(pattern)


def test_names_come_back():
    names = ["a", "", "é" * 40, "b/c"]
    assert list(Names.of(names)) == names and list(Names.of([])) == []


@given(
    st.lists(st.sampled_from(["a", "b", "old", "old/x"]), min_size=1, max_size=3),
    st.lists(
        st.sampled_from(["s.tar", "t.TAR", "u.Tar", ".v.tar", "w.tar.gz", "x.TGZ", "y.tar.idx.npz", "z.tar.part"]),
        min_size=1,
    ),
)
def test_no_tar_in_a_folder_of_shards_is_dropped_in_silence(tmp_path_factory, folders, names):
    root = tmp_path_factory.mktemp("set")
    for folder in ("", *folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).touch()
    tars = sorted({root / name for name in names if name.lower().endswith(".tar") and name[0] != "."})
    packed = {name for name in names if name.lower().endswith((".gz", ".tgz"))}
    with capturing(tar_index.logger) as said:
        if tars:
            assert expand(root) == tars
            text = "\n".join(said)
        else:
            with pytest.raises(DataError, match="holds no") as caught:
                expand(root)
            text = str(caught.value)
    inside = {folder.partition("/")[0] if folder != "old/x" else "" for folder in folders} - {""}
    assert ("1 hidden" in text) == (".v.tar" in names)
    assert (f"{len(packed)} compressed archives, like {min(packed, default='')}" in text) == bool(packed)
    assert (f"{len(tars) * len(inside)} *.tar files in {len(inside)} folders, like" in text) == bool(tars and inside)


def test_a_folder_that_cannot_be_listed_or_only_holds_folders_of_shards(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").touch()
    with pytest.raises(DataError, match=f"but 1 .*tar files in 1 folders, like train: give {tmp_path}/train; name"):
        expand(tmp_path)
    (tmp_path / "1.tar").mkdir()
    with pytest.raises(DataError, match="1.tar isn't a regular file"):
        index_tar(expand(tmp_path)[0])

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"can't be listed \(Permission denied\); fix its permissions"):
        expand(tmp_path)


@contextlib.contextmanager
def capturing(logger):
    """Yields the messages that are logged."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

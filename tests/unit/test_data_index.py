"""Tar shards as they occur: long names, links, damage, several processes at once."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ijepa_scale.data.index import Names, expand, index_path, index_tar
from ijepa_scale.errors import DataError

IMAGE = b"\xff\xd8\xff" + bytes(range(200))


def make_tar(path, members, format=tarfile.GNU_FORMAT):
    """Writes (name, bytes or TarInfo type) members."""
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


def contents(index):
    data = index.path.read_bytes()
    return [data[o : o + s] for o, s in zip(index.offsets, index.sizes, strict=True)]


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
        ("e.cls", b"-5"),
        ("e.jpg", IMAGE + b"5"),
    ]
    index = index_tar(make_tar(tmp_path / "a.tar", members, format))
    assert list(index.keys) == [long, "b", "c", "d", "e"]
    assert index.labels.tolist() == [12, 7, 3, -1, -5]
    assert contents(index) == [IMAGE + b"%d" % n for n in range(1, 6)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"12"), ("b.jpg", IMAGE)], "sample 'a' of shard .* has no image"),
        ([("../a.jpg", IMAGE)], r"member '\.\./a\.jpg' of shard .* leaves its folder"),
        ([("/a.jpg", IMAGE)], "member '/a.jpg' of shard .* leaves its folder"),
        ([("0.jpg", IMAGE), ("a.jpg", tarfile.SYMTYPE)], "'a.jpg' of shard .* is a link.*--dereference"),
        ([("0.jpg", IMAGE), ("a.jpg", tarfile.LNKTYPE)], "'a.jpg' of shard .* is a link"),
        ([("a.jpg", tarfile.FIFOTYPE)], "'a.jpg' of shard .* is a link, a device"),
        ([("a.v1.jpg", IMAGE), ("a.v2.jpg", IMAGE)], "sample 'a' .* has two images, 'a.v1.jpg' and 'a.v2.jpg'"),
        ([("a.jpg", b"")], "image 'a.jpg' .* has 0 bytes; give 1 to"),
        ([("a.jpg", IMAGE), ("a.cls", b"cat")], "'a.cls' .* holds b'cat', no label"),
        ([("a.jpg", IMAGE), ("a.json", b'{"label": "cat"}')], "'a.json' .*no label"),
        ([("a.jpg", IMAGE), ("a.cls", b"9" * 30)], "'a.cls' .*no label"),
        ([("a.jpg", IMAGE), ("a.cls", b"1" * (2 << 20))], "'a.cls' .* a label has at most 1 MiB"),
        ([(".hidden", b"text")], "holds no image .*; drop it from the list"),
    ],
)
def test_what_a_shard_must_not_hold(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        index_tar(make_tar(tmp_path / "a.tar", members))
    assert not index_path(tmp_path / "a.tar").exists()


def test_size_and_count_are_capped(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("b.jpg", IMAGE)])
    monkeypatch.setattr("ijepa_scale.data.index.MAX_MEMBER_BYTES", 100)
    with pytest.raises(DataError, match="image 'a.jpg' .* has 203 bytes; give 1 to 100"):
        index_tar(path)
    monkeypatch.setattr("ijepa_scale.data.index.MAX_MEMBER_BYTES", 1000)
    monkeypatch.setattr("ijepa_scale.data.index.MAX_MEMBERS", 1)
    with pytest.raises(DataError, match="over 1 members; write smaller shards"):
        index_tar(path)


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = make_tar(tmp_path / "a.tar", [(f"{n}.{e}", IMAGE) for n in range(3) for e in ("jpg", "txt")]).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(0, 6 * 1024 + 1, 256):  # six members of 1024 bytes, then the end marker
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut short or damaged|no readable tar"):
            index_tar(cut)
    cut.write_bytes(whole[:2048] + b"\x01" * 512 + whole[2560:])  # a damaged header in the middle
    with pytest.raises(DataError, match="cut short or damaged after byte 2048; copy or write it again"):
        index_tar(cut)


def test_missing_and_compressed_tars_are_refused(tmp_path):
    with pytest.raises(DataError, match="can't be read .No such file"):
        index_tar(tmp_path / "no.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="no readable tar .*uncompressed"):
        index_tar(tmp_path / "z.tar")


def test_the_kept_index_is_used_until_the_tar_changes(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("a.cls", b"12")])
    first = index_tar(path)
    scans = []
    scan = __import__("ijepa_scale.data.index", fromlist=["_scan"])._scan
    monkeypatch.setattr("ijepa_scale.data.index._scan", lambda *a: scans.append(a) or scan(*a))
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
        assert contents(index_tar(path)) == [IMAGE]


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

    monkeypatch.setattr("ijepa_scale.data.index.tempfile.NamedTemporaryFile", refuse)
    assert len(index_tar(path)) == 1
    assert "can't be kept (Permission denied)" in caplog.text


def test_a_folder_marked_read_only_is_left_alone(tmp_path, caplog):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE)])
    tmp_path.chmod(0o555)
    try:
        assert len(index_tar(path)) == 1  # root could write there all the same
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
        ("s-{5..2}.tar", "{5..2} in .* counts no shards"),
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
    with pytest.raises(DataError, match="is no local path; copy the shards to a local folder"):
        expand(pattern)


def test_names_come_back():
    names = ["a", "", "é" * 40, "b/c"]
    assert list(Names.of(names)) == names and list(Names.of([])) == []

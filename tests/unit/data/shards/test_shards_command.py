"""The command line for shards: sizes as text, what the commands print, and their exit codes."""

import io
import json
import os
import runpy
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ijepa_scale.data.shards.byte_sizes import format_bytes, parse_bytes
from ijepa_scale.data.shards.verify import verify_shards
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.tar_index import expand, index_path, index_tar
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from tests.unit.data.shards.image_sets import add, class_folders, encoded, tar_of, tree

SCRIPT = Path(__file__).parents[4] / "launch" / "shards.py"


@pytest.fixture(scope="module")
def command():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def shards(tmp_path):
    """Writes three shards with ten images and returns their folder."""
    folder = tmp_path / "shards"
    classes = ["cat", "dog", "emu"]
    samples = [Sample(f"{n:04d}", encoded(n), n % 3 if n else 1) for n in range(10)]
    paths = write_shards(samples, folder, shard_bytes=3000, classes=classes)
    assert len(paths) == 3
    return folder


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256_000_000), ("1GiB", 1 << 30), ("500kB", 500_000), ("1.5 mb", 1_500_000), ("7B", 7), ("2kib", 2048)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["256", "", "MB", "-1MB", "1XB", "1e3MB", "MB256", "inf MB", "１MB"])
def test_sizes_that_are_none(text):
    with pytest.raises(DataError, match=f"size {text!r} can't be read; give a number with B, kB, .*TiB, like 256MB"):
        parse_bytes(text)


def test_sizes_below_a_byte():
    with pytest.raises(DataError, match="size '0.0001kB' is less than a byte; give a number above 0"):
        parse_bytes("0.0001kB")
    assert [format_bytes(n) for n in (7, 999, 1000, 268_400_000, 3e15)] == [
        "7 B", "999 B", "1.0 kB", "268.4 MB", "3000.0 TB"
    ]  # fmt: skip


def test_make_from_folders(command, tmp_path, capsys):
    root, to = class_folders(tmp_path / "set", 9), tmp_path / "to"
    arguments = ["make", "--root", str(root), "--to", str(to), "--shard-size", "2kB", "--workers", "0"]
    assert command(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("9 images in 3 class folders\n9 images in ") and out.endswith(f"in {to}; left out: none\n")
    source, original = ShardSource(expand(to)), ImageFolderSource(root)
    assert len(source.shard_sizes) > 1
    assert sorted((source.read(n), source.label(n)) for n in range(9)) == sorted(
        (original.read(n), original.label(n)) for n in range(9)
    )
    assert command(arguments) == 2
    error = capsys.readouterr().err
    assert "already holds shards" in error and len(error.splitlines()) == 1


def test_make_from_a_tar_with_options(command, tmp_path, capsys):
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, 6)
    (tmp_path / "set" / "val" / "a" / "bad.jpg").write_bytes(b"bad")
    tar, to = tar_of(tmp_path / "set", tmp_path / "a.tar"), tmp_path / "to"
    arguments = ["make", "--from", "tar", "--root", str(tar), "--split", "val", "--to", str(to), "--workers", "0"]
    arguments += ["--resize-shorter", "8", "--prefix", "val"]
    assert command(arguments) == 2
    assert "error: 1 of 7 images can't be used (1 x not decodable), over the allowed fraction 0.001" in (
        capsys.readouterr().err
    )
    assert command([*arguments, "--max-bad-fraction", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "7 images in 3 classes of" in out and "6 images in 1 shard" in out and "left out: 1 x not decodable" in out
    assert [path.name for path in expand(to)] == ["val-000000.tar"]
    assert command(["verify", str(to), "--workers", "0"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--shard-size", "256"], "error: size '256' can't be read"),
        (["--max-bad-fraction", "2"], "error: max-bad-fraction is 2; give a fraction from 0 to 1"),
        (["--workers", "-1"], "error: workers is -1; give 0 or more processes"),
        (["--to", "{root}/shards"], "is inside --root .* and would become a class; name another folder"),
        (["--from", "csv"], "error: .*/set can't be read .Is a directory.; give a CSV file"),
        (["--root", "{root}/no-such"], "error: folder .*no-such doesn't exist"),
    ],
)
def test_arguments_with_mistakes(command, tmp_path, capsys, change, message):
    root = class_folders(tmp_path / "set", 3)
    arguments = ["make", "--root", str(root), "--to", str(tmp_path / "to"), "--workers", "0"]
    assert command([*arguments, *(text.format(root=root) for text in change)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(error.strip())


def test_an_unknown_kind_of_source_is_refused(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["make", "--from", "os.system", "--root", "x", "--to", "y"])
    assert ended.value.code == 2 and "invalid choice: 'os.system'" in capsys.readouterr().err


def test_control_c_says_how_to_continue(command, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("ijepa_scale.data.shards.make.write_parts", interrupt)
    arguments = ["make", "--root", str(class_folders(tmp_path / "set", 3)), "--to", str(tmp_path / "to")]
    assert command([*arguments, "--workers", "0"]) == 130
    assert "interrupted; run make again with the same arguments" in capsys.readouterr().err


def test_info(command, shards, capsys):
    assert command(["info", str(shards)]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.replace("images per", "per").splitlines())
    assert rows["shards"].startswith("3 of ") and rows["shards"].endswith("in all")
    assert rows["images"].startswith("10 of ") and rows["images"].endswith("on average")
    assert rows["labels"] == "3, from 0 to 2"
    assert rows["per"] == "label  min 3, median 3, max 4"
    assert rows["classes"] == "3 names, cat, dog, emu" and rows["manifest"] == "matches in sizes and counts"
    assert rows["problems"] == "none"


def test_info_reports_what_does_not_match(command, shards, tmp_path, capsys):
    (shards / "classes.json").write_text('["cat"]')
    os.unlink(shards / "shard-000002.tar")
    with tarfile.open(shards / "shard-000001.tar", "w") as tar:
        add(tar, "1.jpg", encoded(1))
        add(tar, "2.cls", b"1")
    assert command(["info", str(shards)]) == 0
    out = capsys.readouterr().out
    for part in (
        "1 names, cat; but there is a label 2", "doesn't match shard-000001.tar",
        "lists 1 missing shards", " x changed shard", " x missing shard", "shard-000001.tar: 10240 bytes, but manifest",
    ):  # fmt: skip
        assert part in out, part
    (shards / "manifest.json").write_text("{}")
    assert command(["info", str(shards)]) == 2
    assert (
        'manifest.json isn\'t a manifest of shards (it has no list "shards"); copy it again' in capsys.readouterr().err
    )
    (shards / "manifest.json").unlink()
    (shards / "making.jsonl").touch()
    assert command(["info", str(shards)]) == 0
    out = capsys.readouterr().out
    for part in ("unfinished: run make again", "1 x no image", "; 1 image without", "no image (jpg"):
        assert part in out, part
    write_shards([Sample("1", encoded(1))], tmp_path / "unlabelled")
    (tmp_path / "unlabelled" / "manifest.json").unlink()
    assert command(["info", str(tmp_path / "unlabelled")]) == 0
    out = capsys.readouterr().out
    assert "none; 1 image without" in out and "manifest          none" in out


def test_index_of_foreign_shards(command, tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "1.jpg", encoded(1))
        add(tar, "2.cls", b"1")
    assert command(["index", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "x.tar: 1 sample; left out: 1 x no image; the first is" in out and index_path(tmp_path / "x.tar").exists()
    assert command(["info", str(tmp_path / "no-such")]) == 2


@pytest.mark.parametrize("workers", ["0", "2"])
def test_verify_finds_nothing_in_good_shards(command, shards, capsys, workers):
    before = tree(shards)
    assert command(["verify", str(shards), "--workers", workers]) == 0
    assert capsys.readouterr().out == "3 shards, 10 images: hashes and images are good\n"
    assert tree(shards) == before
    (shards / "manifest.json").unlink()
    assert command(["verify", str(shards), "--workers", "0"]) == 0
    assert "images (hashes unchecked: no manifest.json) are good" in capsys.readouterr().out


def test_verify_names_each_damaged_shard_and_sample(command, shards, capsys):
    """The faults are a flipped bit that still decodes, an image that doesn't, and a wrong index."""
    first, second, third = sorted(shards.glob("*.tar"))
    index = index_tar(first)
    flip(first, int(index.offsets[2] + index.sizes[2]) - 30)
    index = index_tar(second)
    content = bytearray(second.read_bytes())
    offset, size = int(index.offsets[1]), int(index.sizes[1])
    content[offset + size // 2 : offset + size] = bytes(size - size // 2)
    second.write_bytes(content)
    with np.load(index_path(third)) as arrays:
        kept = dict(arrays)
    kept["labels"] = kept["labels"] + 1
    np.savez(index_path(third), **kept)
    assert command(["verify", str(shards), "--workers", "0"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"bad: {first}: SHA-256 ") and "...; copy or make it again" in lines[0]
    assert lines[1].startswith(f"bad: {second}: SHA-256 ")
    assert lines[2].startswith(f"bad: {second}:{index.keys[1]}: not a decodable image")
    assert lines[3] == f"bad: {index_path(third)}: doesn't match the samples in the shard; remove it"
    assert lines[4:] == ["3 shards, 10 images: 4 faults"]


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_verify_finds_what_is_missing_foreign_cut_or_mislabelled(command, shards, capsys):
    first, second, third = sorted(shards.glob("*.tar"))
    os.truncate(first, first.stat().st_size - 12_000)
    third.unlink()
    (shards / "classes.json").write_text('["cat", "dog"]')
    write_shards([Sample("x", encoded(1), 0)], shards.parent / "other")
    os.rename(shards.parent / "other" / "shard-000000.tar", shards / "foreign.tar")
    (shards / "no.tar").write_bytes(b"no tar" * 300)
    (shards / "making.jsonl").touch()
    assert command(["verify", str(shards), "--workers", "0"]) == 2
    out = capsys.readouterr().out
    for part in (
        f"bad: {third}: missing, though manifest.json lists it",
        f"bad: {shards}: unfinished (making.jsonl exists); run make again with the same arguments",
        f"bad: {shards}/foreign.tar: not in manifest.json; move it away, or make the set again",
        f"bad: shard {shards}/no.tar isn't a readable tar",
        f"bad: {first}: {first.stat().st_size} bytes instead of ",
        "cut short or damaged after byte",
        ": label 2, but there are 2 class names",
    ):
        assert part in out, part


def test_verify_counts_samples_against_a_manifest(command, shards, capsys):
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 99
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert command(["verify", str(shards), "--workers", "0"]) == 2
    assert "samples, manifest.json says 99; make the set again" in capsys.readouterr().out
    (shards / "manifest.json").write_text("[]")
    (shards / "classes.json").write_text("{}")
    assert command(["verify", str(shards), "--workers", "0"]) == 2
    out = capsys.readouterr().out
    assert 'manifest.json isn\'t a manifest of shards (it has no list "shards")' in out and out.endswith("1 fault\n")


def test_verify_reports_a_shard_that_disappeared(tmp_path):
    assert [verdict.faults for verdict in verify_shards([tmp_path / "x.tar"])][1] == (
        f"{tmp_path}/x.tar can't be read (No such file or directory); check the disk",
    )


def test_verify_limits_the_problems_it_names(command, tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", encoded(1))
        for number in range(130):
            add(tar, f"{number}.cls", b"1")
    assert command(["verify", str(tmp_path / "x.tar"), "--workers", "0"]) == 2
    out = capsys.readouterr().out
    assert out.count("no image") == 100 and "x.tar: 30 more problems of these kinds" in out


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(command, tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    root = class_folders(tmp_path / "set", 40)
    monkeypatch.setattr("ijepa_scale.data.shards.command_line._LINE_EVERY_S", 0.0)
    assert command(["make", "--root", str(root), "--to", str(tmp_path / "to"), "--workers", "0"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("16 of 40 images") and lines[-1].startswith("40 of 40 images")
    assert "images/s, 0 shards, 0 left out" in lines[-1] and not any("\r" in line for line in lines)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert command(["make", "--root", str(root), "--to", str(tmp_path / "to2"), "--workers", "0"]) == 0
    assert "40/40" in terminal.getvalue() and "\r" in terminal.getvalue()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("samples", "6", "is '6', not a whole number from 0"), ("bytes", 6.0, "is 6.0, not a whole number from 0"),
        ("bytes", -1, "is -1, not a whole number from 0"), ("samples", True, "is True, not a whole number from 0"),
        ("sha256", 7, "is 7, not a text"), ("name", None, "is None, not a text"),
    ],
)  # fmt: skip
def test_a_manifest_with_values_of_another_kind_is_refused(command, shards, capsys, field, value, said):
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1][field] = value
    path.write_text(json.dumps(manifest))
    for arguments in (["info"], ["verify", "--workers", "0"]):
        assert command([*arguments, str(shards)]) == 2
        captured = capsys.readouterr()
        text = captured.out + captured.err
        assert f'isn\'t a manifest of shards ("{field}" of shard 1 {said}); copy it again, or remove it' in text


@pytest.mark.parametrize("name", ["manifest.json", "classes.json"])
def test_a_pipe_in_the_place_of_a_list_is_refused(command, shards, capsys, name):
    (shards / name).unlink()
    os.mkfifo(shards / name)
    assert command(["info", str(shards)]) == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["info", "index", "classes"])
def test_a_member_that_no_sample_has_is_refused(command, shards, capsys, subcommand):
    (shards / "classes.json").unlink()
    for flag, has in (("--image-member", "jpg"), ("--label-member", "cls")):
        assert command([subcommand, flag, "rgb.png", str(shards)]) == 2
        error = capsys.readouterr().err
        assert f"error: no sample has {flag} rgb.png" in error and "; correct it or leave it out" in error
        assert len(error.splitlines()) == 1
        assert command(["info", flag, has, str(shards)]) == 0
        capsys.readouterr()


def test_names_that_would_break_a_line_are_escaped(command, tmp_path, capsys):
    with tarfile.open(tmp_path / "a\nb.tar", "w") as tar:
        add(tar, "good.jpg", encoded(1))
        add(tar, "x\ny\x1b[31m\udce9.cls", b"3")
    assert command(["info", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[0].endswith("a\\nb.tar:x\\ny\\u001b[31m\\xe9:")
    assert all(line.isprintable() for line in lines)
    (tmp_path / "c\nd.tar").write_text("no tar")
    assert command(["info", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: shard {tmp_path}/c\\nd.tar isn't a readable tar") and error.count("\n") == 1


def test_paths_on_the_command_line_are_expanded(command, tmp_path, capsys, monkeypatch):
    class_folders(tmp_path / "set", 6)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SET", "set")
    monkeypatch.chdir(tmp_path)
    assert command(["make", "--root", "~/$SET", "--to=~/to", "--workers", "0"]) == 0
    assert command(["info", "$HOME/to"]) == 0
    capsys.readouterr()
    for arguments, said in (
        (["make", "--root", "set", "--to", ""], "--to is ''; give a path"),
        (["make", "--root", "$UNSET/a", "--to", "b"], "--root is '$UNSET/a'; the variable UNSET isn't set"),
        (["info", " "], "pattern is ' '; give a path"),
        (["info"], "the following arguments are required: pattern"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "to"]

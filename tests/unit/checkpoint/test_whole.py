"""A damaged checkpoint is set aside, the newest whole one is taken, and no forged manifest costs more than a line."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.checkpoint import folder as steps
from ijepa_scale.checkpoint import store
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, SaveError

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
NAME = "process-00000.safetensors"


def pieces(value: float) -> list[Piece]:
    return [Piece(name="a", tensor=torch.full((6,), float(value)), start=0, shape=(2, 3))]


def write(folder: Path, *numbers: int) -> None:
    for number in numbers:
        store.save(folder, number, pieces(number), world=ALONE, extra={"note": number}, keep=9)


def value_of(checkpoint: store.Checkpoint) -> float:
    filled = pieces(-1)
    checkpoint.load(filled)
    assert filled[0].tensor.unique().numel() == 1
    return float(filled[0].tensor[0])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(str(path)).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(bytes(content))


def plain_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "one bit of the tensors": lambda path: flip(path / NAME),
    "one bit of the manifest": lambda path: flip(path / "manifest.json"),
    "truncated": lambda path: os.truncate(path / NAME, (path / NAME).stat().st_size // 2),
    "longer": lambda path: (path / NAME).write_bytes((path / NAME).read_bytes() + b"\0"),
    "file missing": lambda path: (path / NAME).unlink(),
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "manifest empty": lambda path: (path / "manifest.json").write_bytes(b""),
    "a folder instead of the file": lambda path: ((path / NAME).unlink(), (path / NAME).mkdir()),
    "a plain file": plain_file,
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(kind: str, tmp_path: Path, caplog) -> None:
    write(tmp_path, 1, 2, 3)
    DAMAGE[kind](tmp_path / "step-00000003")
    with caplog.at_level(logging.WARNING):
        found = store.newest_whole(tmp_path, ALONE)
    assert found is not None and found.step == 2 and value_of(found) == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000003", "step-00000001", "step-00000002"]
    assert "step-00000003 is set aside as damaged-step-00000003: " in caplog.text
    write(tmp_path, 3)
    DAMAGE[kind](tmp_path / "step-00000003")
    again = store.newest_whole(tmp_path, ALONE)
    assert again is not None and again.step == 2
    assert (tmp_path / "damaged-step-00000003-1").exists()


def test_without_a_whole_one_the_run_does_not_begin_again_by_itself(tmp_path: Path) -> None:
    assert store.newest_whole(tmp_path / "new", ALONE) is None
    write(tmp_path, 1, 2)
    for path in list(tmp_path.iterdir()):
        flip(path / NAME)
    for _ in range(2):  # the second start finds no checkpoint, only what was set aside
        with pytest.raises(CheckpointError, match="no intact checkpoint, only damaged-.*; set resume=none to"):
            store.newest_whole(tmp_path, ALONE)


def test_what_was_read_once_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    found = store.newest_whole(tmp_path, ALONE)
    assert found is not None
    monkeypatch.setattr("ijepa_scale.checkpoint.manifest.digest_of_files", lambda _: "another")
    assert value_of(found) == 1.0
    with pytest.raises(CheckpointError, match="is damaged"):
        value_of(store.Checkpoint(found.path))


def test_steps_are_ordered_as_numbers_and_other_names_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999, 100_000_000)
    for name in ("step-1", "step-0000000x", "step-00000001.old", "notes"):
        (tmp_path / name).mkdir()
    assert store.newest(tmp_path) == tmp_path / "step-100000000"
    steps.prune(tmp_path, 1, tmp_path / "step-100000000")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-100000000", "step-1", "step-0000000x", "step-00000001.old", "notes"}


@pytest.mark.parametrize("killed_before", range(1, 9))
def test_the_same_step_written_again_leaves_one_whole_at_every_moment(
    killed_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of a name or removal may be the last thing that a process does."""
    write(tmp_path, 7)
    calls = 0

    class Killed(BaseException):
        pass

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == killed_before:
                raise Killed
            return act(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (shutil, "rmtree"), (os, "fsync")):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            store.save(tmp_path, 7, pieces(8), world=ALONE, extra={}, keep=2)
        except Killed:
            pass
        else:
            assert calls < killed_before, "the last moments were tried"
    found = store.newest_whole(tmp_path, ALONE)
    assert found is not None and found.step == 7 and value_of(found) in (7.0, 8.0)


@pytest.mark.parametrize("where", ["tensors", "manifest", "rename", "folder"])
def test_a_failed_save_raises_one_line_and_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "tensors": "ijepa_scale.checkpoint.writing.write_tensors",
        "manifest": "ijepa_scale.checkpoint.writing.write_manifest",
        "rename": "ijepa_scale.checkpoint.folder.put", "folder": "pathlib.Path.mkdir",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(target[where], full)
        with pytest.raises(SaveError) as caught:
            store.save(tmp_path, 2, pieces(2), world=ALONE, extra={}, keep=2)
    text = str(caught.value)
    assert "No space left on device" in text and "it needs 24 bytes" in text and " bytes are free in " in text
    assert "\n" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    write(tmp_path, 2)


def test_a_failed_rename_leaves_the_older_one_of_the_same_step(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, 7)
    rename, calls = os.replace, []

    def failing(source: Any, to: Any) -> None:
        calls.append(to)
        if Path(to).name == "step-00000007" and Path(source).name.startswith(".unfinished"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(SaveError, match="Input/output error"):
            store.save(tmp_path, 7, pieces(8), world=ALONE, extra={}, keep=2)
    assert len(calls) > 2 and [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert value_of(store.Checkpoint(tmp_path / "step-00000007")) == 7.0


def test_what_cannot_be_set_aside_is_one_line(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, 1, 2)
    flip(tmp_path / "step-00000002" / NAME)

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(steps, "set_aside", denied)
    with pytest.raises(CheckpointError, match="step-00000002 is damaged and can't be renamed .*; remove it to resume"):
        store.newest_whole(tmp_path, ALONE)


def test_a_disk_that_is_too_small_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=23))
    monkeypatch.setattr("ijepa_scale.checkpoint.writing.write_tensors", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(SaveError, match="1 bytes too few are free; 23 bytes are free in .*; it needs 24 bytes"):
        write(tmp_path, 1)


def test_older_checkpoints_that_stay_do_not_fail_a_save(tmp_path: Path, monkeypatch, caplog) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("ijepa_scale.checkpoint.folder.prune", denied)
    write(tmp_path, 1)
    assert "older checkpoints of" in caplog.text and "Permission denied" in caplog.text
    assert store.newest(tmp_path) == tmp_path / "step-00000001"


def test_amended_facts_leave_the_tensors(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    before = (path / NAME).read_bytes()
    store.amend(path, {"note": "new", "deep": {"a": [1, None]}})
    found = store.whole(path, ALONE)
    assert found.extra == {"note": "new", "deep": {"a": [1, None]}} and value_of(found) == 1.0
    assert (path / NAME).read_bytes() == before and len(list(path.iterdir())) == 2


def reseal(path: Path, body: Any) -> None:
    """Writes a manifest with a matching hash, as anybody can."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))


FORGED: dict[str, tuple[list[str | int], Any]] = {
    "4 TB": (["tensors", "a", "shape"], [1 << 40]),
    "more elements than bytes": (["tensors", "a"], {"shape": [1 << 40], "pieces": [[0, 0, 1 << 40]]}),
    "file -1": (["tensors", "a", "pieces", 0, 0], -1),
    "file 7": (["tensors", "a", "pieces", 0, 0], 7),
    "negative start": (["tensors", "a", "pieces", 0, 1], -6),
    "beyond the end": (["tensors", "a", "pieces", 0, 1], 3),
    "twice": (["tensors", "a", "pieces"], [[0, 0, 3], [0, 0, 3]]),
    "text for a number": (["tensors", "a", "pieces", 0, 2], "6"),
    "a shape of text": (["tensors", "a", "shape"], ["2", "3"]),
    "1000 dimensions": (["tensors", "a", "shape"], [1] * 1000),
    "no tensors": (["tensors"], None),
    "a step of text": (["step"], "7"),
    "a path": (["files", 0, "name"], "../../etc/passwd"),
    "the folder": (["files", 0, "name"], ".."),
    "no extra": (["extra"], 3),
    "format of text": (["format"], "1"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_manifest_is_refused_before_memory_is_reserved(kind: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    body = json.loads((path / "manifest.json").read_text())["body"]
    *parents, last = FORGED[kind][0]
    place = body
    for key in parents:
        place = place[key]
    place[last] = FORGED[kind][1]
    reseal(path, body)
    with pytest.raises(CheckpointError) as caught:
        store.Checkpoint(path).full("")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def reheader(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a safetensors file says of its tensors."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


FORGED_FILES: dict[str, Callable[[Path], None]] = {
    "another tensor": lambda path: reheader(path, lambda header: header.update({"b": header.pop("a")})),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * path.stat().st_size) and None,
    "nearly nothing": lambda path: path.write_bytes(b"\0" * 30) and None,
    "one element": lambda path: store.write_safetensors({"a": torch.ones(1), "pad": torch.ones(6)}, path),
    "fewer elements": lambda path: store.write_safetensors({"a": torch.ones(4), "pad": torch.ones(6)}, path),
    "two dimensions": lambda path: store.write_safetensors({"a": torch.ones(6, 1)}, path),
    "no dimension": lambda path: store.write_safetensors({"a": torch.ones(()), "pad": torch.ones(6)}, path),
    "another type": lambda path: store.write_safetensors({"a": torch.ones(6, dtype=torch.int64)}, path),
}


@pytest.mark.parametrize("kind", FORGED_FILES)
@pytest.mark.parametrize("name", ["a", "evil\n\x1b[2Jname"])
def test_a_forged_file_is_one_line(kind: str, name: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    FORGED_FILES[kind](path / NAME)
    body = json.loads((path / "manifest.json").read_text())["body"]
    content = (path / NAME).read_bytes()
    body["files"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    body["tensors"] = {name: body["tensors"]["a"]}
    reseal(path, body)
    with pytest.raises(CheckpointError) as caught:
        store.whole(path, ALONE).full("")
    assert str(caught.value).isprintable() and f"{path}" in str(caught.value)


def test_a_manifest_of_something_else_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"name": "0.tar"}]}))
    with pytest.raises(CheckpointError, match=r"isn't a checkpoint: its manifest.json is of something else; give a"):
        store.Checkpoint(tmp_path)


@given(data=st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda c: st.lists(c) | st.dictionaries(
    st.sampled_from(["format", "step", "files", "tensors", "extra", "a"]), c)))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any-json"
    path.mkdir(exist_ok=True)
    reseal(path, {"format": 1, **data} if isinstance(data, dict) else data)
    with pytest.raises(CheckpointError):
        store.Checkpoint(path)
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="damaged"):
        store.Checkpoint(path)

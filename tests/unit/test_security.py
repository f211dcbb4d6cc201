"""Files from others: each would leave a trace, fill the memory or take for ever, and is refused in one line."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ijepa_scale.checkpoint.download import _verify
from ijepa_scale.checkpoint.manifest import write_manifest
from ijepa_scale.checkpoint.sources import CLASSES_KEY, read_weights
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.config.yaml_text import parse_yaml
from ijepa_scale.data.shards.journal import JOURNAL, Journal
from ijepa_scale.errors import ConfigError, DataError, UserError
from ijepa_scale.evaluate.array_file import opened, write_array
from ijepa_scale.evaluate.lowshot_finetune import _stored
from ijepa_scale.evaluate.parts import Parts
from ijepa_scale.regular_file import read_regular
from ijepa_scale.train.command import launch
from ijepa_scale.train.pretrain import PretrainTask
from launch import checkpoint, evaluate, export, report, visualize
from tests.unit.test_disks import made

__all__ = ["made"]
ROOT = Path(__file__).parents[2]
EVIL = "a\x1b[2J\nerror: b\u202ec\r\x9b"  # clears the screen, begins a line, reorders one


def aliases(width: int, levels: int) -> str:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]\n" for n in range(1, levels)]
    return "a0: &a0 [x, x]\n" + "".join(rows)


def merges(width: int, levels: int) -> str:
    rows = [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * width)}], k{n}: 1}}\n" for n in range(1, levels)]
    return "m0: &m0 {a: 1, b: 2}\n" + "".join(rows)


YAML_BOMBS = {
    "billion laughs": (aliases(9, 30), "aliases stand for more than 100000 values"),
    "merge keys": (merges(9, 30), "aliases stand for more than 100000 values"),
    "a chain of merges": (merges(1, 2000), "aliases stand for more than 100000 values"),
    "deep lists": ("[" * 100_000, "nested more than 50 levels deep"),
    "deep mappings": ("{a: " * 100_000, "nested more than 50 levels deep"),
    "indented": ("".join(f"{' ' * n}a:\n" for n in range(1000)), "nested more than 50 levels deep"),
    "many values": ("[" + "1," * 150_000 + "]", "more than 100000 values"),
    "a huge text": (
        "a: '" + "x" * 10**7 + "'",
        "10000005 characters are too many for a",
    ),
    "a huge number": ("a: " + "9" * 10**5, "a number of 100000 digits"),
    "a huge hexadecimal": ("a: 0x" + "f" * 10**5, "a number of 100002 digits"),
    "an alias in itself": ("a: &a [*a]", "the alias *a leads back to itself"),
    "a merge of itself": ("a: &a {<<: *a}", "the alias *a leads back to itself"),
    "code": ("a: !!python/object/apply:os.system ['touch TRACE']", "could not determine a constructor"),
    "code by its whole tag": ("a: !<tag:yaml.org,2002:python/name:os.system> x", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_is_bounded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text, said = YAML_BOMBS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", "c.yaml", "--print-config"])
    with pytest.raises(SystemExit) as ended:
        launch("", PretrainTask)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1 and len(error) < 400
    assert time.process_time() - before < 20 and os.listdir(tmp_path) == ["c.yaml"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000, "KiB"


@given(width=st.integers(1, 12), levels=st.integers(1, 40), kind=st.sampled_from([aliases, merges]))
@settings(max_examples=60, deadline=None)
def test_what_aliases_stand_for_is_small_or_refused(width: int, levels: int, kind: Callable[[int, int], str]) -> None:
    try:
        found = parse_yaml(kind(width, levels), "c")
    except ConfigError as error:
        assert "aliases stand for more than 100000 values" in str(error) and width**levels * levels > 5_000
    else:
        assert len(json.dumps(found)) < 5_000_000


JSON_BOMBS: dict[str, bytes] = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "a huge number": b'{"a": ' + b"9" * 100_000 + b"}",
    "an infinite number": b'{"a": 1e999}',
    "NaN": b'{"a": NaN}',
    "a key twice": b'{"a": 1, "a": 2}',
    "no UTF-8": b'{"a": "\xff"}',
    "not an object": b"[]",
    "nothing": b"",
    "another kind": b'{"shards": {"a": 1}, "top1": "1", "bytes": []}',
}


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_of_caches_is_refused_or_made_again(name: str, tmp_path: Path, caplog: Any) -> None:
    """The files that this program keeps for itself may lie where others write."""
    bomb = JSON_BOMBS[name]
    if name not in ("not an object", "another kind"):
        with pytest.raises(ValueError):
            parse_json(bomb)
    (tmp_path / JOURNAL).write_bytes(bomb.replace(b"\n", b"") + b"\n")
    with pytest.raises(DataError, match="is damaged|started with other arguments"):
        Journal(tmp_path, {"plan": 1})
    (tmp_path / "top1.json").write_bytes(bomb)
    assert _stored(tmp_path / "top1.json") is None and "top1.json is damaged" in caplog.text
    weights = tmp_path / "w.pth.tar"
    weights.write_bytes(b"weights")
    (tmp_path / "w.pth.tar.json").write_bytes(bomb)
    with pytest.raises(UserError, match="can't be read; remove it|has changed since its first use"):
        _verify(weights)
    text = bomb.decode(errors="replace")
    save_file({"ids": torch.zeros(1, dtype=torch.int64)}, tmp_path / "part-0000000000.safetensors", {"skipped": text})
    assert not Parts(tmp_path, 1, batch_size=1)._is_whole(tmp_path / "part-0000000000.safetensors") or bomb == b"{}"
    save_file({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "w.safetensors", {CLASSES_KEY: text})
    if name != "not an object":  # an empty list of classes is one
        with pytest.raises(UserError, match="class names can't be read"):
            read_weights(str(tmp_path / "w.safetensors"))


ROW = {"name": "shard-000000.tar", "bytes": 1, "samples": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [{"name": "../outside.tar"}, {"name": "/tmp/outside.tar"}, {"name": ".."}, {"name": 3}, {"bytes": -1},
     {"bytes": 1.5},      {"samples": "1"}, {"samples": True}, {"sha256": None}, {"more": 1}],
)  # fmt: skip
def test_a_forged_journal_reaches_no_file_outside(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (tmp_path / "outside.tar.part").write_bytes(b"x")
    line = {"shard": ROW | change, "next_place": 1, "left_out": {}}
    (folder / JOURNAL).write_text(json.dumps({"plan": 1}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"making.jsonl is damaged \(.*\); start again in an empty folder"):
        Journal(folder, {"plan": 1})
    assert sorted(os.listdir(tmp_path)) == ["outside.tar.part", "shards"] and os.listdir(folder) == [JOURNAL]


class Trace:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def npz(path: Path, trace: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3, np.float32))


def pickled(path: Path, trace: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Trace(trace)], dtype=object), allow_pickle=True)


def header(shape: tuple[int, ...], descr: str = "<f4") -> Callable[[Path, Path], None]:
    def write(path: Path, trace: Path) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            file.write(b"\0" * 64)

    return write


FORGED_ARRAYS: dict[str, Callable[[Path, Path], None]] = {
    "an archive": npz,
    "a pickle": pickled,
    "4 TB": header((3, 10**12)),
    "a size beyond 64 bits": header((3, 10**30)),
    "a negative size": header((3, -1)),
    "other rows": header((2, 4)),
    "no rows": header(()),
    "texts": header((3,), "<U4"),
    "a deep header": lambda path, trace: path.write_bytes(b"\x93NUMPY\x01\x00\xff\x7f" + b"(" * 0x7FFF) and None,
    "a long header": lambda path, trace: path.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 999) and None,
    "text": lambda path, trace: path.write_text("hello") and None,
    "nothing": lambda path, trace: path.touch(),
}


@pytest.mark.parametrize("name", FORGED_ARRAYS)
def test_stored_features_are_plain_numbers_or_computed_again(name: str, tmp_path: Path, caplog: Any) -> None:
    FORGED_ARRAYS[name](tmp_path / "a.npy", tmp_path / "TRACE")
    assert opened(tmp_path / "a.npy", 3) is None
    assert re.search(r"a\.npy is damaged \(.+\); it is recomputed", caplog.text)
    assert os.listdir(tmp_path) == ["a.npy"]
    write_array(tmp_path / "a.npy", (3, 2), [np.ones((3, 2), np.float32)])
    assert opened(tmp_path / "a.npy", 3).sum() == 6  # type: ignore[union-attr]


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    path = tmp_path / "c.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # of holes, which take no room
    with pytest.raises(OSError, match="1099511627776 bytes are too many"):
        read_regular(path)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(path)])
    with pytest.raises(SystemExit) as ended:
        launch("", PretrainTask)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blocks.0.mlp.fc1.weight": (8, 4)}, "has no patch_embed.proj.weight|isn't a known encoder"),
        ({"patch_embed.proj.weight": (4, 3, 2, 2)}, "has no blocks.0.mlp.fc1.weight"),
        ({"patch_embed.proj.weight": (0, 3, 2, 2), "blocks.0.mlp.fc1.weight": (8, 4)}, r"of shape \(0, 3, 2, 2\)"),
        ({"patch_embed.proj.weight": (4, 3, 2, 2), "blocks.0.mlp.fc1.weight": (8,)}, r"of shape \(8,\)"),
        ({"patch_embed.proj.weight": (4, 3, 2, 2), "blocks.0.mlp.fc1.weight": (8, 4),
          "blocks.99999999999.norm1.weight": (4,)}, "has block 99999999999 but only 3 tensors"),
    ],
)  # fmt: skip
def test_forged_weights_build_nothing(
    tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path, capsys: Any
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "w.safetensors")
    code = export.main([str(tmp_path / "w.safetensors"), "--to", str(tmp_path / "a.onnx")])
    error = capsys.readouterr().err
    assert code == 2 and re.search(said, error) and error.count("\n") == 1, error


def lines_of(error: str) -> list[str]:
    """Returns the lines of an output, none of which may hold what a terminal acts on."""
    assert not set(error) & set("\x1b\u202e\x9b\r"), ascii(error)
    return error.splitlines()


def hostile_checkpoint(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    save_file({name: torch.zeros(2)}, folder / "process-00000.safetensors")
    from ijepa_scale.checkpoint.digests import digest_of_files

    path = folder / "process-00000.safetensors"
    facts = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest_of_files([path])}
    write_manifest(folder, 1, [{**facts, "pieces": [[name, 0, 2, [2]]]}], {EVIL: {EVIL: EVIL}})
    return folder


def test_names_cannot_write_to_the_terminal(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names in checkpoints, settings, files on the command line and in folders, and messages of libraries."""
    one = hostile_checkpoint(tmp_path / EVIL, f"model.{EVIL}")
    other = hostile_checkpoint(tmp_path / "b", f"model.x{EVIL}")
    calls: list[tuple[Callable[[list[str]], object], list[str]]] = [
        (checkpoint.main, ["diff", str(one), str(other)]),
        (checkpoint.main, ["ls", str(one)]),
        (checkpoint.main, ["convert", str(one), "--to", str(one)]),
        (checkpoint.main, ["rm", str(one), "3"]),
        (export.main, [str(one), "--to", str(tmp_path / f"{EVIL}.safetensors")]),
        (export.main, [str(made / "run"), "--to", EVIL]),
        (visualize.main, ["curves", str(tmp_path / f"{EVIL}.csv")]),
        (visualize.main, ["curves", str(made / "run"), "--fields", EVIL, "--to", str(tmp_path / "a.png")]),
        (report.main, [str(made / "run"), "--to", EVIL]),
        (evaluate.main, [EVIL, "--data", EVIL, EVIL, "--to", str(tmp_path / EVIL / "ev")]),
    ]
    (tmp_path / "c.yaml").write_text(json.dumps({EVIL: EVIL, "folder": EVIL, "seed": EVIL, "data": {EVIL: 1}}))
    for settings_given in ([], [f"{EVIL}={EVIL}"], [f"seed={EVIL}"], [f"optimizer.name={EVIL}"], ["--devices", EVIL]):
        for config in (str(tmp_path / "c.yaml"), str(tmp_path / EVIL), str(ROOT / "configs" / "demo.yaml")):
            calls.append((pretrained(monkeypatch), ["--config", config, *settings_given, "data.workers=x"]))
    monkeypatch.chdir(tmp_path)
    for call, words in calls:
        try:
            code = call(words)
        except SystemExit as ended:
            code = ended.code
        said = capfd.readouterr()
        assert code in (0, 2), words
        assert not any(line.startswith("error: b") for line in lines_of(said.out + said.err)), said
        assert "Traceback" not in said.err


def pretrained(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], object]:
    def call(given: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
        launch("", PretrainTask)
        return 0

    return call


def test_tensorboard_is_never_bound_to_all_interfaces() -> None:
    """No script and no page starts or recommends a server that others reach; alone it listens on this host only."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("Makefile"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]
    for top in ("ijepa_scale", "launch", "benchmarks", "kernels"):
        files += (ROOT / top).rglob("*.py")
    assert len(files) > 300
    for path in files:
        text = path.read_text()
        starts = re.findall(r"tensorboard .*--\S+.*", text)
        assert not [line for line in starts if re.search(r"--(bind_all|host)", line)], path
        assert path.suffix == ".md" or not re.search(r"bind_all|[\"'](0\.0\.0\.0|::)[\"']", text), path
    assert "tensorboard --logdir runs/mine/tensorboard" in (ROOT / "docs" / "security.md").read_text()


def test_tensorboard_alone_listens_on_this_host_only(tmp_path: Path) -> None:
    from tensorboard import program

    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(tmp_path)])
    assert board.flags.host is None and not board.flags.bind_all

"""Damaged files through the command lines: each is taken, or refused in words with exit code 2; never a traceback."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from ijepa_scale.models import build_encoder
from ijepa_scale.train.command import launch
from ijepa_scale.train.pretrain import PretrainTask
from launch import export, plan, shards

ROOT = Path(__file__).parents[2]
SEEDS = range(10)  # of each of the 20 files below: 200 in all
PIECES = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\n", b"\t", b"&a ", b"*a", b"<<: ", b"!!", b"{{ x }}", b"\0",
    b"\xff", b"\xc3", b"- ", b"0012", b"1e999", b"NaN", b"null", b"9" * 5000, b"[" * 3000, b"{a: 1}: ", b"%", b"---\n",
    b"$HOME", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"!!python/object/apply:os.system [x]", b"!!timestamp x", b".inf",
    b'"\\ud800"',
)  # fmt: skip
VALUES = (
    None, True, 0, -1, 1.5, 2**62, 2**70, 10**400, 1e308, "", "auto", "0012", "\ud800", "a\nb", "\0", "~", "$X", "${a}",
    [], [[1]], {}, {"a": {"b": None}}, "9" * 5000, {"": 1}, {"a.b": 2}, "\x1b[0m",
)  # fmt: skip


def weights(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    content = {"state_dict": TENSORS, "epoch": 3, "args": {"lr": 1e-3, "betas": (0.9, 0.95), "name": "x"}}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """Returns the bytes with some removed, changed, repeated, put in or cut off."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 6))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(5)
        if kind == 0:
            del data[at : at + draw.choice((1, 5, 50))]
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = draw.choice(PIECES)
        elif kind == 3:
            data[at:at] = data[draw.randrange(len(data) + 1) :][: draw.choice((4, 40))]
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def value_changed(content: bytes, draw: random.Random) -> bytes:
    """Returns a YAML or JSON text in which one value is another; JSON is YAML too."""
    tree = yaml.safe_load(content)
    places = [([tree], 0)]
    for inside, key in places:
        if isinstance(inside[key], (dict, list)):
            keys = inside[key] if isinstance(inside[key], dict) else range(len(inside[key]))
            places += [(inside[key], each) for each in keys]
    places = places[1:]
    inside, key = draw.choice(places)
    inside[key] = draw.choice(VALUES)
    return json.dumps(tree).encode()


def pretrain(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(path), "--print-config"])
    launch("", PretrainTask)
    return 0


def planned(path: Path, _: pytest.MonkeyPatch) -> int:
    demo = str(ROOT / "configs" / "demo.yaml")
    return plan.main(["--config", demo, "--gpus", "8x", "h100", f"engine.ds_config={path}"])


def verified(path: Path, _: pytest.MonkeyPatch) -> int:
    return shards.main(["verify", str(path.parent), "--workers", "0"])


def made(path: Path, _: pytest.MonkeyPatch) -> int:
    to = str(path.parent / "shards")
    return shards.main(["make", "--from", "csv", "--root", str(path), "--to", to, "--workers", "0"])


def exported(path: Path, _: pytest.MonkeyPatch) -> int:
    return export.main([str(path), "--to", str(path.parent / "out.safetensors"), "--overwrite"])


TENSORS = build_encoder("vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=2, heads=3, seed=0).state_dict()
INDEX = json.dumps({"weight_map": {"norm.weight": "a.safetensors", "norm.bias": "a.safetensors"}}).encode()
CONFIGS = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))[:6]]
ZERO = [path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))[:3]]
LISTS = [b'path,label\n0.png,"a"\n1.png,b\n' + end for end in (b"", b"0.png,c\r\n", b"1.png,\xc3\xa9\n")]
MANIFEST = b'{"shards": [{"name": "a.tar", "bytes": 3, "samples": 2, "sha256": "00"}]}'
FILES: list[tuple[str, bytes, Callable[[Path, pytest.MonkeyPatch], int]]] = [
    *(("c.yaml", content, pretrain) for content in CONFIGS),
    *(("zero.json", content, planned) for content in ZERO),
    *(("l.csv", content, made) for content in LISTS),
    ("manifest.json", MANIFEST, verified), ("classes.json", b'["a", "b"]', verified),
    ("model.safetensors.index.json", INDEX, exported),
    ("w.pth", weights(zipped=True), exported), ("w.pth", weights(zipped=True)[:-200], exported),
    ("w.pt", weights(zipped=False), exported), ("w.ckpt", weights(zipped=False), exported),
    ("w.safetensors", save(TENSORS), exported),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with what the files name: two images, a tar, a file of tensors."""
    for number in range(2):
        Image.fromarray(np.full((8, 8, 3), 50 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
    (tmp_path / "a.safetensors").write_bytes(save(TENSORS))
    return tmp_path


def outcome(call: Callable[[], int], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code and what was written."""
    try:
        code = call()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capfd.readouterr()
    return code, said.err + said.out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(FILES)), ids=lambda number: f"{number}-{FILES[number][0]}")
def test_a_damaged_file_is_taken_or_refused_in_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    name, content, run = FILES[number]
    codes = []
    for seed in SEEDS:
        draw = random.Random(f"{number} {seed}")
        change = value_changed if name.endswith((".yaml", ".json")) and seed % 2 else bytes_changed
        (folder / name).write_bytes(change(content, draw))
        shutil.rmtree(folder / "shards", ignore_errors=True)
        code, said = outcome(partial(run, folder / name, monkeypatch), capfd)
        codes.append(code)
        assert code in (0, 2) and "Traceback" not in said, (seed, code, said)
        assert said.strip(), f"seed {seed} said nothing"
        malformed = re.search(r"not readable as|can't be read|isn't an? |holds no weights", said)
        assert not malformed or run in (verified, made) or said.strip().count("\n") == 0, (seed, said)
    assert 2 in codes, "no change was noticed"

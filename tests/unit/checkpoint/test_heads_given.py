"""Attention heads that the source doesn't tell: given to an export, kept in what it writes, refused where wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import ijepa_scale
from ijepa_scale.checkpoint import programs
from ijepa_scale.checkpoint.export import export
from ijepa_scale.checkpoint.sources import read_weights
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models import build_encoder
from ijepa_scale.visualize.pictures import draw
from launch import export as command
from tests.unit.checkpoint.exporting import SMALL, pretrained

HEADS = 6


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A file of an architecture without a name, which doesn't tell its heads."""
    encoder = build_encoder("vit_tiny", image_size=(16, 16), patch_size=4, width=48, depth=2, heads=HEADS, seed=0)
    save_file(encoder.state_dict(), tmp_path / "silent.safetensors")
    return tmp_path / "silent.safetensors"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt2", "timm"])
def test_exports_take_heads(name: str, silent: Path, tmp_path: Path, capsys: Any) -> None:
    kind = ["--as", "timm"] if name == "timm" else []
    if name != "a.safetensors":
        assert command.main([str(silent), "--to", str(tmp_path / name), *kind]) == 2
        assert (
            "doesn't state the heads of its encoder; give load(..., heads=...), or --heads" in capsys.readouterr().err
        )
    assert command.main([str(silent), "--to", str(tmp_path / name), *kind, "--heads", str(HEADS)]) == 0
    if name == "a.safetensors":
        assert read_weights(tmp_path / name).facts.heads == HEADS
        encoder, _ = ijepa_scale.load(str(tmp_path / name))
        assert encoder.blocks[0].attn.heads == HEADS


def test_heads_that_cannot_be_are_refused_by_name(silent: Path, tmp_path: Path, capsys: Any) -> None:
    assert command.main([str(silent), "--to", str(tmp_path / "a.safetensors"), "--heads", "7"]) == 2
    said = f"error: heads is 7, which doesn't divide the width 48 of {silent}; give a divisor, such as 3\n"
    assert capsys.readouterr().err == said
    with pytest.raises(ValueError, match="heads is 7, which doesn't divide the width 48"):
        draw(
            "pca",
            to=str(tmp_path / "a.png"),
            overwrite=False,
            source=str(silent),
            heads=7,
            images=[str(silent)],
            times=1,
        )
    run = pretrained(tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=r"heads is 99, but .* has \d+; drop the flag"):
        export(run, tmp_path / "a.safetensors", heads=99)
    with pytest.raises(CheckpointError, match="--heads is 3, which reference doesn't use"):
        export(run, tmp_path / "a.pth.tar", heads=3, steps_per_epoch=1)


def test_a_small_onnx_leaves_no_data_of_a_large_one(silent: Path, tmp_path: Path, monkeypatch: Any) -> None:
    to = tmp_path / "a.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_MOST_INSIDE", 0)
        export(silent, to, heads=HEADS)
    assert to.with_name("a.onnx.data").exists()
    export(silent, to, heads=HEADS)
    assert sorted(path.name for path in tmp_path.glob("a.onnx*")) == ["a.onnx"]


def test_pictures_of_a_source_load_its_encoder_once(tmp_path: Path, caplog: Any) -> None:
    from ijepa_scale.visualize.source import PictureSource

    source = PictureSource(source=str(pretrained(tmp_path / "run", **SMALL)))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            source.encoder()
            source.encoder(2)
    assert caplog.text.count("loaded the target encoder") == 2, "at the trained size and at twice that"

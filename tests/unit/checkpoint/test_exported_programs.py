"""Exports that run without this package: ONNX and torch.export, their comparison, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch

import ijepa_scale
from ijepa_scale.checkpoint import programs
from ijepa_scale.checkpoint.export import export
from ijepa_scale.checkpoint.models_of_weights import predictor_of_source
from ijepa_scale.checkpoint.sources import open_source, read_weights
from ijepa_scale.errors import CheckpointError
from launch import export as command
from tests.unit.checkpoint.exporting import SMALL, close, finetuned, images_for, logits_of, pretrained


def opened(path: Path):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(str(path))
    names = [each.name for each in session.get_inputs()]
    return lambda *given: torch.from_numpy(
        session.run(None, dict(zip(names, (each.numpy() for each in given), strict=True)))[0]
    )


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_programs_give_the_same_for_any_batch(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pretrained(tmp_path / "run", **SMALL)
    encoder, _ = ijepa_scale.load(source)
    monkeypatch.setattr(programs, "_MOST_INSIDE", 0)  # ONNX's weights next to it
    export(source, tmp_path / "out" / f"encoder{suffix}")
    for count in (1, 5):
        images = images_for(encoder, count)
        close(opened(tmp_path / "out" / f"encoder{suffix}")(images), encoder(images))
    data = {"encoder.onnx.data"} if suffix == ".onnx" else set()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"encoder{suffix}", *data}


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.long)])
def test_a_classifiers_program_gives_its_logits(tmp_path: Path, suffix: str) -> None:
    source = finetuned(tmp_path / "run", representation="last4", pool_norm="after")
    export(source, tmp_path / f"classifier{suffix}")
    images = images_for(ijepa_scale.load(source)[0], 4)
    close(opened(tmp_path / f"classifier{suffix}")(images), logits_of(source, images))


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors", pytest.param(".onnx", marks=pytest.mark.long)])
def test_a_predictor_travels(tmp_path: Path, suffix: str) -> None:
    source = pretrained(tmp_path / "run", **SMALL)
    predictor = predictor_of_source(open_source(source))
    export(source, tmp_path / f"predictor{suffix}", which="predictor")
    if suffix == ".safetensors":
        found = open_source(tmp_path / "predictor.safetensors").predictor()
        assert found is not None and all(torch.equal(found[n], t) for n, t in predictor.state_dict().items())
        with pytest.raises(CheckpointError, match="which isn't a known encoder"):
            read_weights(tmp_path / "predictor.safetensors")
        return
    draw = torch.Generator().manual_seed(0)
    context = torch.randn(3, 6, 24, generator=draw)
    places = (torch.randint(16, (3, 6), generator=draw), torch.randint(16, (2, 3, 4), generator=draw))
    close(opened(tmp_path / f"predictor{suffix}")(context, *places), predictor(context, *places))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("wrong", ["values", "nan", "shape"])
def test_a_program_that_differs_is_refused_and_nothing_is_left(tmp_path, monkeypatch, suffix, wrong):
    source = pretrained(tmp_path / "run", **SMALL)
    (tmp_path / f"e{suffix}").write_bytes(b"old")
    change = {"values": lambda t: t + 2e-4, "nan": lambda t: t * math.nan, "shape": lambda t: t[:, :1]}[wrong]

    def differs(module, inputs, dynamic, path, facts):
        path.write_bytes(b"new")
        return lambda *tensors: change(module(*tensors))

    monkeypatch.setattr(programs, "_write_onnx" if suffix == ".onnx" else "_write_torch", differs)
    with pytest.raises(CheckpointError, match="would give .*, so it isn't kept; report it"):
        export(source, tmp_path / f"e{suffix}")
    assert {file.name for file in tmp_path.iterdir()} == {"run", f"e{suffix}"}
    assert (tmp_path / f"e{suffix}").read_bytes() == b"old"


def test_missing_packages_and_impossible_formats_are_named(tmp_path, monkeypatch, capsys):
    source = str(pretrained(tmp_path / "run", **SMALL))
    for arguments, text in [
        (["--to", "x"], "x ends in none of .safetensors, .pth.tar, .onnx, .pt2; add --as timm or --as transformers"),
        (["--to", "x.onnx", "--as", "timm"], "x.onnx can't be written as timm; give a folder"),
        (["--to", "x", "--as", "onnx"], "x can't be written as onnx; give a name that ends in .onnx"),
        (["--to", "x", "--as", "timm", "--weights", "predictor"], "timm has no model for it; choose safetensors, onnx"),
        (["--to", "x.pth.tar", "--weights", "predictor"], "holds encoder, target and predictor together"),
    ]:
        assert command.main([source, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
    monkeypatch.setattr(programs, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(
        CheckpointError, match=r"ONNX needs no_such_package; install ijepa_scale\[onnx\], or export as t"
    ):
        export(source, tmp_path / "x.onnx")
    encoder = tmp_path / "encoder.safetensors"
    export(source, encoder)
    with pytest.raises(
        CheckpointError, match="isn't a checkpoint of this package, whose optimiser's states a .pth.tar holds"
    ):
        export(encoder, tmp_path / "x.pth.tar", steps_per_epoch=5)
    with pytest.raises(CheckpointError, match="holds no predictor; give a pretraining run"):
        export(encoder, tmp_path / "x.pt2", which="predictor")
    content = safetensors.torch.load_file(encoder)
    with safetensors.safe_open(str(encoder), framework="pt") as file:
        said = file.metadata()
    bad = tmp_path / "bad.safetensors"
    safetensors.torch.save_file({**content, "head.weight": torch.zeros(3, 25)}, bad, metadata=said)
    with pytest.raises(
        CheckpointError, match=r"its head.weight is \(3, 25\); this package's .* a linear head on 24 ch"
    ):
        export(bad, tmp_path / "x", kind="timm")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.onnx").exists()

"""Exports, opened by the real timm and transformers, and read back."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from hypothesis import given, strategies
from PIL import Image
from torch import Tensor

import ijepa_scale
from ijepa_scale.checkpoint.export import export
from ijepa_scale.checkpoint.geometry import mlp_ratio
from ijepa_scale.checkpoint.sources import read_weights
from ijepa_scale.checkpoint.whole import write_folder
from ijepa_scale.config import ModelConfig
from ijepa_scale.environment import child_environment
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.registry import build_jepa
from launch import export as command
from tests.unit.checkpoint.exporting import (
    NORMALISATION,
    SIZES,
    SMALL,
    close,
    finetuned,
    images_for,
    logits_of,
    pretrained,
)


def assert_plain_tensors_are_read(path: Path, case: str, encoder: torch.nn.Module, images: Tensor) -> None:
    """Reads another program's file or folder, which says less than an export."""
    known = {} if path.is_dir() else {"heads": encoder.blocks[0].attn.heads, "image_size": tuple(images.shape[2:])}
    known |= {name: values[: encoder.channels] for name, values in NORMALISATION.items()}
    if case == "interpolated":
        with pytest.raises(CheckpointError, match="isn't a fixed sine-cosine embedding of any grid"):
            ijepa_scale.load(path, **known)
        return
    close(ijepa_scale.load(path, **known)[0](images), encoder(images))


def by_the_card(folder: Path, model: torch.nn.Module, images: Tensor) -> Tensor:
    """Returns what the last line of code of a model card computes."""
    line = (folder / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0].splitlines()[-1]
    return eval(line.partition(" = ")[2], {"model": model, "images": images})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case: pretrained(tmp_path_factory.mktemp("runs") / "run", **sizes) for case, sizes in SIZES.items()}


@pytest.mark.parametrize(("case", "which"), [*((case, "target") for case in SIZES), ("not square", "context")])
def test_timm_opens_the_folder_and_the_file_and_back(tmp_path: Path, runs: dict, case: str, which: str) -> None:
    source = runs[case]
    encoder, _ = ijepa_scale.load(source, which=which)
    images = images_for(encoder)
    wanted = encoder(images)
    written = export(source, tmp_path / "out", kind="timm", which=which)
    assert written.opens == f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)'
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    close(theirs.forward_features(images), wanted)
    close(theirs(images), wanted.mean(dim=1))
    close(by_the_card(tmp_path / "out", theirs, images), wanted.mean(dim=1))
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "overlay" in line]
    by_file = eval(line.removeprefix("model = ").replace("FOLDER", str(tmp_path / "out")), {"timm": timm})
    close(by_file.eval().forward_features(images), wanted)
    back, transform = ijepa_scale.load(tmp_path / "out", which=which)
    close(back(images), wanted)
    assert transform.mean == tuple(NORMALISATION["mean"][: encoder.channels])
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert_plain_tensors_are_read(tmp_path / "theirs.pth", case, encoder, images)


@pytest.mark.parametrize("case", SIZES)
def test_transformers_opens_the_folder_in_one_line_and_back(tmp_path: Path, runs: dict, case: str) -> None:
    source = runs[case]
    encoder, transform = ijepa_scale.load(source)
    images = images_for(encoder)
    wanted = encoder(images)
    export(source, tmp_path / "out", kind="transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    close(model(pixel_values=images).last_hidden_state, wanted)
    close(by_the_card(tmp_path / "out", model, images), wanted.mean(dim=1))
    close(ijepa_scale.load(tmp_path / "out")[0](images), wanted)
    model.save_pretrained(tmp_path / "theirs")
    torch.save(model.state_dict(), tmp_path / "theirs.pth")  # with the names that modules have since transformers 5
    assert any(name.startswith("layers.0.") for name in model.state_dict())
    for theirs in (tmp_path / "theirs", tmp_path / "theirs.pth"):
        assert_plain_tensors_are_read(theirs, case, encoder, images)
    has_processor = (tmp_path / "out" / "preprocessor_config.json").exists()
    assert has_processor == (case not in ("4 channels", "not square"))


def test_transformers_makes_the_same_images(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "run", **dict(SMALL, image_size=(96, 96)))
    _, transform = ijepa_scale.load(source)
    export(source, tmp_path / "out", kind="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    noise = np.random.default_rng(0).integers(0, 256, (13, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((200, 130), Image.Resampling.BICUBIC)
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert transform.crop_fraction == 0.875 and theirs.shape == (3, 96, 96)
    levels = (theirs - transform(picture)).abs() * torch.tensor(transform.std)[:, None, None] * 255
    assert float(levels.max()) <= 2.0 and float(levels.mean()) < 0.5


@pytest.mark.parametrize("pool_norm", ["after", "before"])
def test_a_classifier_gives_the_same_logits_elsewhere(tmp_path: Path, pool_norm: str) -> None:
    source = finetuned(tmp_path / "run", pool_norm=pool_norm)
    images = images_for(ijepa_scale.load(source)[0])
    wanted = logits_of(source, images)
    export(source, tmp_path / "timm", kind="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    close(theirs(images), wanted)
    close(by_the_card(tmp_path / "timm", theirs, images), wanted)
    assert theirs.pretrained_cfg["label_names"] == ["cat", "dog", "newt"]
    close(logits_of(tmp_path / "timm", images), wanted)
    if pool_norm == "after":
        with pytest.raises(
            CheckpointError, match="norm after the pooling .* before it: logits would differ; export it"
        ):
            export(source, tmp_path / "hf", kind="transformers")
        return
    export(source, tmp_path / "hf", kind="transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    close(model(images).logits, wanted)
    close(by_the_card(tmp_path / "hf", model, images), wanted)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "newt"}
    close(logits_of(tmp_path / "hf", images), wanted)
    (tmp_path / "later").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "later")
    torch.save(model.state_dict(), tmp_path / "later" / "pytorch_model.bin")
    close(logits_of(tmp_path / "later", images), wanted)
    tokens = transformers.AutoModel.from_pretrained(tmp_path / "hf")(images).last_hidden_state
    close(tokens, ijepa_scale.load(source)[0](images))


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_four_pooled_layers_are_refused_where_there_is_one(tmp_path: Path, kind: str) -> None:
    source = finetuned(tmp_path / "run", representation="last4", pool_norm="before")
    with pytest.raises(
        CheckpointError, match="pools 4 layers .* the last one; export it as onnx, torch or safetensors"
    ):
        export(source, tmp_path / "out", kind=kind)
    assert not (tmp_path / "out").exists()


def test_what_timm_cannot_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pretrained(tmp_path / "run", **SMALL)
    export(source, tmp_path / "hf", kind="transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    tensors = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "hf" / "model.safetensors")  # without our metadata
    with pytest.raises(CheckpointError, match="layer norms of eps 1e-05, and timm's have 1e-06"):
        export(tmp_path / "hf", tmp_path / "out", kind="timm")
    export(tmp_path / "hf", tmp_path / "again", kind="transformers")
    images = images_for(ijepa_scale.load(source)[0])
    models = [transformers.AutoModel.from_pretrained(tmp_path / name) for name in ("hf", "again")]
    close(models[1](images).last_hidden_state, models[0](images).last_hidden_state, 0.0)
    monkeypatch.setattr("ijepa_scale.checkpoint.timm_folder._ANY", "vit_large_patch16_224")
    with pytest.raises(CheckpointError, match="in timm .*'s vit_large_patch16_224; export it as safetensors"):
        export(source, tmp_path / "out", kind="timm")
    assert not (tmp_path / "out").exists()


def test_the_command_replaces_only_its_own_folder(tmp_path, capsys):
    source, to = str(pretrained(tmp_path / "run", **SMALL)), tmp_path / "out"
    arguments = [source, "--as", "transformers", "--to", str(to)]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f'open it with transformers.AutoModel.from_pretrained("{to}")'
    assert command.main(arguments) == 2 and "exists; give another name, or add --overwrite" in capsys.readouterr().err
    (to / "config.json").write_text("{}")
    assert command.main([*arguments, "--overwrite"]) == 0
    assert json.loads((to / "config.json").read_text())["hidden_size"] == 24
    (to / "thesis.tex").write_text("x")
    assert command.main([*arguments, "--overwrite"]) == 2
    assert "holds thesis.tex, which isn't of this export; name another folder" in capsys.readouterr().err
    assert (to / "thesis.tex").exists() and (to / "model.safetensors").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"run", "out"}


def test_a_folder_that_fails_is_not_there(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("no space left")

    with pytest.raises(CheckpointError, match=r"can't be written \(no space left\); free space, or name another place"):
        write_folder(tmp_path / "out", fails)
    assert not list(tmp_path.iterdir())


def test_the_card_tells_the_licence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = build_jepa(ModelConfig(**SMALL), seed=0).encoder
    content = {"target_encoder": encoder.state_dict(), "encoder": encoder.state_dict()}
    torch.save(content, tmp_path / "IN1K-vit.h.14-300e.pth.tar")
    torch.save(content, tmp_path / "mine.pth.tar")
    for name, licence in (("IN1K-vit.h.14-300e", "cc-by-nc-4.0"), ("mine", None)):
        source = tmp_path / f"{name}.pth.tar"
        with pytest.raises(ValueError, match="doesn't state the heads"):
            export(source, tmp_path / "out", kind="timm")
        run = pretrained(tmp_path / f"run-{name}", **SMALL, init=str(source))
        for kind in ("timm", "transformers"):
            export(run, tmp_path / f"{kind}-{name}", kind=kind)
            card = (tmp_path / f"{kind}-{name}" / "README.md").read_text()
            assert ('license: "cc-by-nc-4.0"' in card) == ("no commercial use" in card) == (licence is not None)
            assert ("states no licence" in card) == (licence is None)
            assert read_weights(tmp_path / f"{kind}-{name}").facts.licence == licence


def test_other_architectures_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48)
    transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(
        tmp_path / "vit"
    )
    classed = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, img_size=32, num_classes=0)
    torch.save(classed.state_dict(), tmp_path / "classed.pth")
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "resnet.pth").read_bytes()[:5000])
    capsys.readouterr()  # what transformers says while it saves
    for source, text in {
        "vit": "isn't a fixed sine-cosine embedding of any grid",
        "classed.pth": "isn't a fixed sine-cosine embedding of any grid",
        "resnet.pth": "which isn't a known encoder; give one with the published names",
        "half.pth": "cut short",
    }.items():
        for kind in ("timm", "transformers", "onnx"):
            to = str(tmp_path / ("out.onnx" if kind == "onnx" else "out"))
            assert command.main([str(tmp_path / source), "--as", kind, "--to", to]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert text in line
    assert {path.name for path in tmp_path.iterdir()} == {"vit", "classed.pth", "resnet.pth", "half.pth"}


@given(width=strategies.integers(1, 400), mlp_width=strategies.integers(1, 4000))
def test_a_ratio_gives_its_width_back(width: int, mlp_width: int) -> None:
    assert int(width * mlp_ratio(width, mlp_width)) == mlp_width


@pytest.mark.long
def test_transformers_4_opens_the_folder(tmp_path: Path) -> None:
    """Installs transformers 4 into a folder of its own, and compares features and logits there."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), "transformers<5"]
    subprocess.run(install, check=True, timeout=900)
    cases = {
        "encoder": pretrained(tmp_path / "run", **SIZES["giant"]),
        "head": finetuned(tmp_path / "c", pool_norm="before"),
    }
    code = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
for name, kind in (("encoder", "AutoModel"), ("head", "AutoModelForImageClassification")):
    images, wanted = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    found = getattr(transformers, kind).from_pretrained(f"{sys.argv[1]}/{name}")(images)
    found = found.last_hidden_state if name == "encoder" else found.logits
    assert (found - wanted).abs().max() <= 1e-5, (name, (found - wanted).abs().max())
    transformers.AutoImageProcessor.from_pretrained(f"{sys.argv[1]}/{name}")
"""
    for name, source in cases.items():
        encoder, _ = ijepa_scale.load(source)
        images = images_for(encoder)
        wanted = encoder(images) if name == "encoder" else logits_of(source, images)
        torch.save([images, wanted.detach()], tmp_path / f"{name}.pt")
        export(source, tmp_path / name, kind="transformers")
    environment = child_environment(PYTHONPATH=str(packages))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, timeout=600)


def test_images_without_a_processor_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = pretrained(tmp_path / "run", **SIZES["4 channels"])
    with caplog.at_level(logging.WARNING):
        export(source, tmp_path / "out", kind="transformers")
    assert "no image processor for 4 channels of uint16 at 32 x 32; preprocessor_config.json is left out" in caplog.text

"""Files for other programs, read back as those programs read them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.export import export_published, export_safetensors
from ijepa_scale.checkpoint.sources import FACTS_KEY, WHICH_KEY
from ijepa_scale.checkpoint.weights import load_weights
from ijepa_scale.config import ModelConfig, PretrainConfig
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.registry import build_jepa
from ijepa_scale.optim.lars import LarsConfig
from launch import export

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
MODEL = ModelConfig(
    name="vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=3, predictor_width=12, predictor_depth=1
)


def random(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, step: int = 20, **changes) -> tuple[store.Checkpoint, dict[str, torch.Tensor]]:
    """Returns a pretraining checkpoint of random weights and moments, and the tensors in it."""
    state: dict[str, torch.Tensor] = {}
    for index, (name, parameter) in enumerate(build_jepa(MODEL, seed=0).named_parameters()):
        for kind, part in enumerate(("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")):
            state[part + name] = random(parameter.shape, 10 * index + kind).abs()
        if name.startswith("encoder."):
            state["target." + name.removeprefix("encoder.")] = random(parameter.shape, 10 * index + 5)
    pieces = [Piece(name=n, tensor=t.flatten(), start=0, shape=tuple(t.shape)) for n, t in state.items()]
    config = PretrainConfig(model=MODEL).values()
    extra = {"config": config, "identity": {"batch size of all processes": 12}, **changes}
    return store.Checkpoint(store.save(folder / "checkpoints", step, pieces, world=ALONE, extra=extra, keep=1)), state


class Published(nn.Module):
    """Imitates a module of the published code, in which a fixed embedding is a frozen parameter of the module."""

    def __init__(self, ours: nn.Module, name: str) -> None:
        super().__init__()
        self.module = copy.deepcopy(ours)
        embedding = self.module._buffers.pop(name)
        self.module._parameters[name] = nn.Parameter(embedding, requires_grad=False)
        if name == "pos_embed":
            assert next(iter(self.module.named_parameters()))[0] == name


def test_the_published_code_can_resume(tmp_path: Path) -> None:
    checkpoint, state = saved(tmp_path)
    content = torch.load(
        export_published(checkpoint, tmp_path / "out.pth.tar", steps_per_epoch=10, processes=3), weights_only=True
    )
    assert set(content) == {
        "encoder", "predictor", "target_encoder", "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr",
    }  # fmt: skip
    assert (content["epoch"], content["batch_size"], content["world_size"]) == (2, 4, 3)
    assert content["lr"] == 1e-3  # the peak
    assert content["opt"]["param_groups"][0]["lr"] == pytest.approx(2e-4 + 20 / 400 * 8e-4) and math.isnan(
        content["loss"]
    )
    ours = build_jepa(MODEL, seed=1)
    encoder, predictor = Published(ours.encoder, "pos_embed"), Published(ours.predictor, "predictor_pos_embed")
    target = copy.deepcopy(encoder)
    for module, key in ((encoder, "encoder"), (predictor, "predictor"), (target, "target_encoder")):
        module.load_state_dict(content[key])
    assert torch.equal(target.module.blocks[1].mlp.fc1.weight, state["target.blocks.1.mlp.fc1.weight"])
    assert torch.equal(predictor.module.mask_token, state["model.predictor.mask_token"])
    small = lambda name, p: "bias" in name or p.ndim == 1  # noqa: E731
    groups = [
        {
            "params": [p for n, p in module.named_parameters() if small(n, p) == last],
            **({"WD_exclude": True} if last else {}),
        }
        for last in (False, True)
        for module in (encoder, predictor)
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(content["opt"])
    for part, module in (("encoder", encoder), ("predictor", predictor)):
        for name, parameter in module.named_parameters():
            found, name = optimizer.state[parameter], name.replace("module.", f"{part}.")
            if name.endswith("pos_embed"):
                assert not found
                continue
            assert found["step"] == 20
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found[moment], state[f"optimizer.{moment}.{name}"]), name
    excluded = [group.get("WD_exclude", False) for group in optimizer.param_groups]
    assert excluded == [False, False, True, True]
    assert [group["weight_decay"] > 0 for group in optimizer.param_groups] == [True, True, False, False]
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(content["scaler"])
    assert scaler.get_scale() == 65536.0


def test_what_the_published_code_cannot_resume_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match="is 6 steps into epoch 3 of 7 steps; .* a checkpoint of step 14"):
        export_published(checkpoint, tmp_path / "out", steps_per_epoch=7)
    with pytest.raises(CheckpointError, match="batch 12 is not divisible by 5 processes; give a divisor"):
        export_published(checkpoint, tmp_path / "out", steps_per_epoch=10, processes=5)
    with pytest.raises(CheckpointError, match="isn't a pretraining checkpoint; give one that has a target encoder"):
        export_published(saved(tmp_path / "b", config={})[0], tmp_path / "out", steps_per_epoch=10)
    config = PretrainConfig(model=MODEL, optimizer=LarsConfig()).values()
    with pytest.raises(CheckpointError, match=r"optimizer.name=lars, and the published file holds AdamW's states; exp"):
        export_published(saved(tmp_path / "c", config=config)[0], tmp_path / "out", steps_per_epoch=10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("naming", ["published", "transformers"])
@pytest.mark.parametrize("which, prefix", [("target", "target."), ("context", "model.encoder.")])
def test_safetensors_come_back(tmp_path: Path, naming: str, which: str, prefix: str) -> None:
    _, state = saved(tmp_path)
    path = export_safetensors(tmp_path, tmp_path / "sub" / "out.safetensors", which=which, naming=naming)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata.pop(FACTS_KEY))
    assert metadata == {"format": "pt", WHICH_KEY: which}
    images = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "pixels": "uint8"}
    assert said == {"image_size": [16, 16], "heads": 3, **images}
    report = load_weights(model := build_jepa(MODEL, seed=1).encoder, path, which=which)
    assert report.share == 1.0 and report.notes == ()
    assert all(torch.equal(parameter, state[prefix + name]) for name, parameter in model.named_parameters())
    other = "context" if which == "target" else "target"
    with pytest.raises(CheckpointError, match=f"holds only the {which} encoder, but {other} is requested"):
        load_weights(model, path, which=other)
    assert [file.name for file in path.parent.iterdir()] == ["out.safetensors"]  # no unfinished file is left


def test_an_unknown_naming(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="naming is 'jax'; choose one of published, transformers"):
        export_safetensors(tmp_path, tmp_path / "out", naming="jax")


@pytest.mark.parametrize(
    ("to", "flags", "said"),
    [
        ("out.safetensors", ["--steps-per-epoch", "10"], "--steps-per-epoch is 10, which safetensors doesn't use"),
        ("out.onnx", ["--processes", "3"], "--processes is 3, which onnx doesn't use"),
        ("out.pt2", ["--naming", "transformers"], "--naming is transformers, which torch doesn't use"),
        ("out", ["--as", "timm", "--naming", "transformers"], "--naming is transformers, which timm doesn't use"),
        (
            "out.safetensors",
            ["--weights", "predictor", "--naming", "transformers"],
            "--naming is transformers, which safetensors of the predictor doesn't use",
        ),
        (
            "out.pth.tar",
            ["--weights", "context", "--steps-per-epoch", "10"],
            "--weights is context, which reference doesn't use",
        ),
    ],
)
def test_flags_that_a_format_would_leave_out_are_refused(tmp_path, capsys, to, flags, said):
    saved(tmp_path / "run")
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / to), *flags]) == 2
    assert f"error: {said}; drop the flag" in capsys.readouterr().err and not (tmp_path / to).exists()


def test_the_published_file_from_the_command_line(tmp_path, capsys):
    saved(tmp_path / "run")
    to = str(tmp_path / "out.pth.tar")
    assert export.main([str(tmp_path / "run"), "--to", to]) == 2
    assert "a .pth.tar counts epochs; give --steps-per-epoch" in capsys.readouterr().err
    assert export.main([str(tmp_path / "run"), "--to", to, "--steps-per-epoch", "10", "--processes", "3"]) == 0
    content = torch.load(to, weights_only=True)
    assert (content["epoch"], content["batch_size"]) == (2, 4)

"""A run that starts from a published file goes on as the program that wrote it would, under every engine.

That program's loop stands here in plain PyTorch: its groups, schedules, average and file.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_scale.checkpoint.sources import open_source
from ijepa_scale.checkpoint.start import fill_states, optimizer_states, start_from
from ijepa_scale.config import AdamWConfig, EngineConfig, RegressionConfig
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.world import World
from ijepa_scale.masks import DenseMasks, MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.schedules import Schedule
from ijepa_scale.train.step import TrainStep
from tests.distributed.harness import run
from tests.distributed.training import BATCH, MODEL, full_state, images_of, masks_config, part

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
EPOCH, SAVED, MORE = 4, 4, 8  # steps of an epoch, before the file, and after it
SCHEDULE = Schedule(
    steps_per_epoch=EPOCH, epochs=4, warmup_epochs=1, ipe_scale=1.0, start_lr=1e-3, lr=5e-3, final_lr=1e-4,
    weight_decay=0.1, final_weight_decay=0.5, momentum=(0.6, 1.0),
)  # fmt: skip
OPTIMIZER = AdamWConfig(eps=1e-5)  # large, so that gradients that are 0 but for rounding change nothing
ENGINES = {
    "plain": (1, {"strategy": "plain"}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "zero2": (2, {"strategy": "deepspeed", "ds_config": "ds_configs/zero2.json"}),
    "zero3": (2, {"strategy": "deepspeed", "ds_config": "ds_configs/zero3_small.json"}),
}


class Published:
    """The modules of the published program, in which fixed embeddings are frozen parameters, and its optimiser."""

    def __init__(self) -> None:
        jepa = build_jepa(MODEL, seed=3)
        self.encoder, self.predictor = jepa.encoder, jepa.predictor
        for module, name in ((self.encoder, "pos_embed"), (self.predictor, "predictor_pos_embed")):
            module._parameters[name] = nn.Parameter(module._buffers.pop(name), requires_grad=False)  # type: ignore[arg-type]
        self.target = copy.deepcopy(self.encoder)
        parts = (self.encoder, self.predictor)
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in part.named_parameters() if "bias" not in n and p.ndim > 1]} for part in parts
        ]
        for part_of in parts:
            small = [p for n, p in part_of.named_parameters() if "bias" in n or p.ndim == 1]
            groups.append({"params": small, "WD_exclude": True, "weight_decay": 0})
        self.optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
        self.sampler = MaskSampler(masks_config(), MODEL.grid, seed=5)

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            s = step + 1
            total, warm = 4 * EPOCH, EPOCH
            cosine = 1e-4 + 4.9e-3 * 0.5 * (1 + math.cos(math.pi * (s - warm) / (total - warm)))
            for number, group in enumerate(self.optimizer.param_groups):
                group["lr"] = 1e-3 + s / warm * 4e-3 if s < warm else cosine
                if number < 2:
                    group["weight_decay"] = 0.5 - 0.4 * 0.5 * (1 + math.cos(math.pi * s / total))
            masks = self.sampler(step, 0, BATCH, BATCH)
            assert isinstance(masks, DenseMasks)
            images = images_of(part(step, ALONE))
            with torch.no_grad():
                tokens = F.layer_norm(self.target(images), (MODEL.width,))  # type: ignore[arg-type]
                wanted = [tokens.gather(1, t[..., None].expand(-1, -1, MODEL.width)) for t in masks.targets]
            context = self.encoder(images, masks.context[0])
            loss = F.smooth_l1_loss(self.predictor(context, masks.context[0], masks.targets), torch.cat(wanted))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            momentum = 0.6 + step * 0.4 / total
            with torch.no_grad():
                for average, weight in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                    average.mul_(momentum).add_((1 - momentum) * weight)
            losses.append(float(loss.detach()))
        return losses

    def save(self, path: Path, **changes: Any) -> Path:
        parts = {"encoder": self.encoder, "predictor": self.predictor, "target_encoder": self.target}
        wrapped = {name: {f"module.{n}": t for n, t in p.state_dict().items()} for name, p in parts.items()}
        rest = {"opt": self.optimizer.state_dict(), "scaler": None, "epoch": SAVED // EPOCH, "loss": 0.1, "lr": 5e-3}
        torch.save({**wrapped, **rest, "batch_size": BATCH, "world_size": 1, **changes}, path)
        return path

    def state(self) -> dict[str, Tensor]:
        trained = {f"encoder.{n}": p for n, p in self.encoder.named_parameters() if p.requires_grad}
        trained |= {f"predictor.{n}": p for n, p in self.predictor.named_parameters() if p.requires_grad}
        found = {f"target.{n}": p for n, p in self.target.named_parameters() if n != "pos_embed"}
        for name, parameter in trained.items():
            found[f"model.{name}"] = parameter
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.{kind}.{name}"] = self.optimizer.state[parameter][kind]
        return {name: tensor.detach().flatten() for name, tensor in found.items()}


def gone_on(world: World, engine: dict, path: str) -> dict[str, Any]:
    """Returns the losses of the steps after the file, the state after them, and the target's features before them."""
    module = build_jepa(MODEL, seed=9)
    target = build_target(module)
    source = open_source(path)
    start_from(source, module, target)
    built = build_engine(world, EngineConfig(**engine, precision="fp32"), OPTIMIZER)
    built.prepare(module, target)
    states = optimizer_states(source, MODEL, EPOCH)
    fill_states(built.pieces(), states, source.origin)
    built.loaded(states.optimizer_step)
    features = built.target(images_of(part(0, ALONE))).clone()
    step = TrainStep(
        built,
        augment=images_of,
        masks=MaskSampler(masks_config(), MODEL.grid, seed=5),
        schedule=SCHEDULE,
        objective=build_objective(RegressionConfig(), triton=()),
        batch_size=BATCH,
        meters=Meters(world.device),
    )
    losses = [
        float(world.mean(step(part(index, world)).loss.clone())) for index in range(states.step, states.step + MORE)
    ]
    return {"step": states.step, "losses": losses, "state": full_state(world, built), "features": features}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = Published()
    before = program.train(range(SAVED))
    path = program.save(tmp_path_factory.mktemp("published") / "jepa-ep1.pth.tar")
    with torch.no_grad():
        features = program.target(images_of(part(0, ALONE)))
    losses = program.train(range(SAVED, SAVED + MORE))
    assert losses[-1] < 0.8 * before[0]  # it learns
    return {"path": str(path), "losses": losses, "state": program.state(), "features": features}


@pytest.mark.parametrize("name", ENGINES)
def test_eight_more_steps_are_the_files_own(published: dict[str, Any], name: str) -> None:
    processes, engine = ENGINES[name]
    found = run(gone_on, processes, engine, published["path"], alone=name == "plain")[0]
    assert found["step"] == SAVED
    assert (found["features"] - published["features"]).abs().max() <= 1e-6
    differences = [abs(a - b) for a, b in zip(found["losses"], published["losses"], strict=True)]
    assert max(differences) <= (3e-8 if name == "plain" else 2e-7), differences
    assert found["state"].keys() == published["state"].keys()
    for tensor, expected in published["state"].items():
        tolerance = 1e-6 if tensor.startswith(("model.", "target.")) else 1e-7
        torch.testing.assert_close(
            found["state"][tensor], expected, atol=tolerance, rtol=0, msg=lambda t, n=tensor: f"{n}: {t}"
        )


def test_without_the_optimisers_state_the_steps_differ(published: dict[str, Any]) -> None:
    """So the test above can fail."""
    module = build_jepa(MODEL, seed=9)
    source = open_source(published["path"])
    start_from(source, module, build_target(module))
    built = build_engine(ALONE, EngineConfig(strategy="plain", precision="fp32"), OPTIMIZER)
    built.prepare(module, build_target(module))
    states = optimizer_states(source, MODEL, EPOCH)
    moments = [piece for piece in built.pieces() if piece.name.startswith("optimizer.")]
    assert moments and not any(piece.tensor.any() for piece in moments)
    fill_states(built.pieces(), states, source.origin)
    assert all(torch.equal(p.tensor, states.tensors[p.name].flatten()) for p in moments) and moments[0].tensor.any()

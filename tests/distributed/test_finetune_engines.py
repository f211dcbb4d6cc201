"""Finetuning gives the same numbers under every engine: layer-wise rates, drop path, frozen blocks, no target."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ijepa_scale.checkpoint.store import Checkpoint, newest, save
from ijepa_scale.config import EncoderConfig, EngineConfig
from ijepa_scale.config.finetune_run import ClassifierConfig, FinetuneOptimizerConfig
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.world import World
from ijepa_scale.models.classifier import build_classifier, drop_factors
from ijepa_scale.optim.groups import layer_decay_groups
from ijepa_scale.schedules import FinetuneSchedule
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES, loss_difference, worst
from tests.distributed.training import BATCH, full_state, images_of, part

STEPS = 8
MODEL = ClassifierConfig(
    encoder=EncoderConfig(name="vit_tiny", image_size=(32, 32), patch_size=4, width=48, depth=3, heads=3),
    num_classes=4,
    drop_path=0.4,
)
OPTIMIZER = FinetuneOptimizerConfig(lr=2e-3, layer_decay=0.5)
SCHEDULE = FinetuneSchedule(
    steps_per_epoch=4, epochs=10, warmup_epochs=0.5, lr=2e-3, min_lr=1e-6, weight_decay=OPTIMIZER.weight_decay
)


def curve(
    world: World, engine: dict, frozen: int = 0, steps: int = STEPS, resume: str | None = None, impl: str = "auto"
) -> dict[str, Any]:
    """Returns global losses, gradient norms and the state of a finetuning that resumes from `resume`, if given."""
    module = build_classifier(MODEL.replace(frozen_blocks=frozen), seed=1)
    settings = EngineConfig(**{"precision": "fp32", **engine})
    built = build_engine(world, settings, OPTIMIZER.adamw(BATCH).replace(impl=impl))
    built.prepare(module, groups=functools.partial(layer_decay_groups, layer_decay=OPTIMIZER.layer_decay))
    first = 0
    if resume is not None and (found := newest(resume)) is not None:
        checkpoint = Checkpoint(found)
        checkpoint.load(built.pieces())
        built.loaded(checkpoint.step)
        first = checkpoint.step
    losses, norms = [], []
    for step in range(first, steps):
        for micro in built.accumulate(part(0, world)):
            positions = micro.position + np.arange(len(micro))
            drop = drop_factors(module.drop_rates, seed=7, step=step, samples=positions)
            labels = torch.from_numpy(positions % 4)
            built.backward(cross_entropy(built.model(images_of(micro), drop), labels))
        info = built.step(SCHEDULE(step), step)
        built.evaluate(images_of(part(0, world)))  # must not change the training
        losses.append(float(world.mean(info.loss.clone())))
        norms.append(float(info.grad_norm))
    if resume is not None:
        save(resume, steps, built.pieces(), world=world, extra={}, keep=1)
    logits = built.evaluate(images_of(part(99, world)))
    whole = torch.cat([torch.as_tensor(each) for each in world.gather_objects(logits.tolist())])
    return {"losses": losses, "norms": norms, "state": full_state(world, built), "logits": whole}


@functools.cache
def reference(frozen: int = 0) -> dict[str, Any]:
    return run(curve, 1, {"strategy": "plain"}, frozen, alone=True)[0]


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert loss_difference(found, expected) <= 1e-5
    assert max(abs(a - b) for a, b in zip(found["norms"], expected["norms"], strict=True)) <= 1e-5
    assert worst(found, expected, "model.") <= 1e-5
    assert worst(found, expected, "optimizer.") <= 1e-6
    assert float((found["logits"] - expected["logits"]).abs().max()) <= 1e-5


def test_weights_change_in_proportion_to_their_rates() -> None:
    found, start = reference(), build_classifier(MODEL, seed=1).state_dict()
    assert found["losses"][-1] < found["losses"][0]
    moved = {
        n: float((found["state"][f"model.{n}"] - v.flatten()).abs().max()) for n, v in start.items() if "pos" not in n
    }
    rates = [moved[n] for n in ("encoder.patch_embed.proj.weight", "encoder.blocks.1.mlp.fc1.weight", "head.weight")]
    assert 0 < 2 * rates[0] < rates[1] and 2 * rates[1] < rates[2]


@pytest.mark.parametrize("name", ["plain", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_finetuning_equals_one_process(name: str) -> None:
    processes, engine = ENGINES.get(name, (1, {"strategy": "plain"}))
    for found in run(curve, processes, {**engine, "accumulation": 2}, alone=name == "plain"):
        agree(found, reference())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_frozen_blocks_do_not_change_and_are_saved(name: str, tmp_path) -> None:
    expected, start = reference(2), build_classifier(MODEL, seed=1).state_dict()
    frozen = [n for n in start if n.startswith(("encoder.patch_embed.", "encoder.blocks.0.", "encoder.blocks.1."))]
    processes, engine = ENGINES[name]
    run(curve, processes, engine, 2, 4, tmp_path)
    found = run(curve, processes, {**engine, "checkpointing": "full"}, 2, STEPS, tmp_path)[0]
    agree(
        {**found, "losses": expected["losses"][:4] + found["losses"], "norms": expected["norms"][:4] + found["norms"]},
        expected,
    )
    assert all(torch.equal(found["state"][f"model.{n}"], start[n].flatten()) for n in frozen)
    assert not any(n.startswith("optimizer.") and n.split(".", 2)[2] in frozen for n in found["state"])


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_bf16_finetuning_is_close_to_one_process(name: str) -> None:
    processes, engine = ENGINES[name]
    expected = run(curve, 1, {"strategy": "plain", "precision": "bf16"}, alone=True)[0]
    found = run(curve, processes, {**engine, "precision": "bf16"})[0]
    assert loss_difference(found, expected) <= 5e-3  # bf16 keeps 8 bits
    assert 0 < loss_difference(expected, reference()) < 5e-2  # it did run in bf16

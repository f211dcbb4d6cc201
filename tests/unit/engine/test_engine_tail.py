"""The fused tail through the engine, with its eager implementation: the same training as with AdamW and the update."""

from __future__ import annotations

import copy
import functools
import json
import sys
from typing import Any

import pytest
import torch

from ijepa_scale.config import AdamWConfig, EncoderConfig, EngineConfig
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.low_copies import CopiedLinear
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, NonFiniteError
from ijepa_scale.models import build_target
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.optim.fused_tail import FusedTailAdamW
from ijepa_scale.optim.groups import layer_decay_groups
from ijepa_scale.schedules import Hyper
from tests.unit.kernels.kernel_harness import run
from tests.unit.models.packing_by_hand import images_of, random_masks, small_jepa

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
STEPS = 20
CLASSIFIER = ClassifierConfig(
    encoder=EncoderConfig(name="vit_tiny", image_size=(16, 24), patch_size=4, width=16, depth=3, heads=2),
    num_classes=4,
    drop_path=0.0,
)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(FusedTailAdamW, "implementation", "eager")


def hyper(step: int) -> Hyper:
    return Hyper(lr=1e-3 * (step + 1) / STEPS, weight_decay=0.04 + 0.01 * step, momentum=0.9 + 0.004 * step)


def pretraining(impl: str, clip: float | None = None, late: bool = False, **engine: Any) -> Any:
    settings = EngineConfig(**{"strategy": "plain", "precision": "fp32", **engine})
    built: Any = build_engine(WORLD, settings, AdamWConfig(impl=impl, clip_norm=clip))
    jepa = small_jepa(shake=0.02)
    built.prepare(jepa, build_target(jepa))
    built._watch = FiniteWatch(WORLD, late=late)
    return built


def take(engine: Any, step: int, spoil: bool = False) -> torch.Tensor:
    """Takes a step of pretraining towards the target's tokens, and returns its loss."""
    images, masks = images_of(4) + 0.1 * step, random_masks(1, 2, 4)
    tokens = engine.target(images, wanted=masks.targets[0])
    prediction = engine.model(images, masks)
    loss = (prediction[: len(tokens)].float() - tokens.float()).square().mean()
    engine.backward(loss * torch.nan if spoil else loss)
    info = engine.step(hyper(step), step)
    engine.update_target(hyper(step).momentum, info)
    return info.loss


def state(engine: Any) -> dict[str, torch.Tensor]:
    return {piece.name: piece.tensor.clone() for piece in engine.pieces()}


def same(one: Any, other: Any) -> bool:
    found, expected = state(one), state(other)
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
def test_training_is_that_of_adamw_and_the_targets_update_bit_for_bit(clip, late) -> None:
    fused, plain = pretraining("fused_tail", clip, late), pretraining("torch", clip, late)
    start = state(fused)
    for step in range(STEPS):
        assert torch.equal(take(fused, step), take(plain, step))
    assert same(fused, plain)
    assert all(not torch.equal(start[name], value) for name, value in state(fused).items()), "everything has moved"
    assert all(value["step"] == STEPS for value in fused.optimizer.state.values())


@pytest.mark.parametrize("late", [False, True])
def test_a_nan_step_changes_nothing_not_even_copies(late) -> None:
    engine = pretraining("fused_tail", late=late, precision="bf16", target_precision="fp8")
    take(engine, 0)
    before, buffers = state(engine), [buffer.clone() for buffer in engine.module.buffers()]
    target = [value.clone() for value in engine.target_module.state_dict().values()]
    with pytest.raises(NonFiniteError, match="step 1: process 0 has loss nan"):
        take(engine, 1, spoil=True)
        take(engine, 2)  # a late check raises here
    assert all(torch.equal(before[name], value) for name, value in state(engine).items())
    assert all(map(torch.equal, buffers, engine.module.buffers()))
    assert all(map(torch.equal, target, engine.target_module.state_dict().values()))
    assert all(value["step"] == 1 for value in engine.optimizer.state.values())


@pytest.mark.parametrize("target_precision", [None, "fp8"])
def test_a_loaded_run_continues_as_if_never_stopped(target_precision) -> None:
    options = {"precision": "bf16", "target_precision": target_precision}
    whole = pretraining("fused_tail", **options)
    for step in range(4):
        if step == 2:
            resumed = pretraining("fused_tail", **options)
            saved = state(whole)
            for piece in resumed.pieces():
                piece.tensor.copy_(saved[piece.name])
            resumed.loaded(2)
        losses = [take(engine, step) for engine in ((whole,) if step < 2 else (whole, resumed))]
        assert torch.equal(losses[0], losses[-1])
    assert same(whole, resumed)


def test_states_of_torchs_adamw_are_loaded() -> None:
    plain, fused = pretraining("torch"), pretraining("fused_tail")
    take(plain, 0)
    saved = state(plain)
    for piece in fused.pieces():
        piece.tensor.copy_(saved[piece.name])
    fused.loaded(1)
    assert torch.equal(take(fused, 1), take(plain, 1)) and same(fused, plain)


@pytest.mark.parametrize("target_precision", [None, "fp8"])
def test_copies_are_the_rounded_weights_after_each_step(target_precision) -> None:
    engine = pretraining("fused_tail", precision="bf16", target_precision=target_precision)
    exact = pretraining("torch", precision="bf16", target_precision=target_precision)
    layers = [part for part in engine.module.modules() if isinstance(part, CopiedLinear)]
    assert len(layers) == 4 * 4 + 2  # each block's, and the predictor's first and last
    for step in range(3):
        losses = [take(each, step) for each in (engine, exact)]
        assert float((losses[0] - losses[1]).abs()) <= 1e-3 * float(losses[1])
        for part in layers:
            assert torch.equal(part.weight_copy, part.weight.bfloat16())
            assert torch.equal(part.bias_copy, part.bias.bfloat16())
        for (name, value), rounded in zip(engine._replicated.values.items(), engine._replicated.copies, strict=True):
            assert rounded is None or torch.equal(rounded, value.bfloat16()), name
    fresh = pretraining("fused_tail", precision="bf16", target_precision=target_precision)
    for mine, value in zip(fresh._replicated.shards, engine._replicated.shards, strict=True):
        mine.copy_(value)
    fresh._replicated.loaded()
    assert torch.equal(fresh.target(images_of(2)), engine.target(images_of(2))), "bf16 and fp8 copies are renewed"


def test_the_kernel_itself_trains_the_same_by_interpreter() -> None:
    found = json.loads(run("-m", "tests.unit.engine.interpret_tail", TRITON_INTERPRET="1").splitlines()[-1])
    # in bf16 and fp8 the interpreter cuts off where PyTorch rounds, and other copies give other gradients
    limits = {"fp32": (1e-6, 2e-7, 1e-7), "fp8": (1e-3, 3e-5, 1e-3)}
    assert found.keys() == limits.keys()
    for name, limit in limits.items():
        assert all(a <= b for a, b in zip(found[name], limit, strict=True)), (name, found[name])


def classifier(impl: str, frozen: int, averaged: bool, precision: str) -> Any:
    module = build_classifier(CLASSIFIER.replace(frozen_blocks=frozen), seed=1)
    settings = EngineConfig(strategy="plain", precision=precision)
    built: Any = build_engine(WORLD, settings, AdamWConfig(impl=impl))
    groups = functools.partial(layer_decay_groups, layer_decay=0.5)
    average = copy.deepcopy(module) if averaged else None
    if average is not None:  # as after loading other weights: the average of frozen weights moves too
        with torch.no_grad():
            for parameter in average.parameters():
                parameter.add_(0.01)
    built.prepare(module, average, groups=groups, followed="")
    return built


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("frozen", [0, 2])
def test_finetuning_with_rates_by_layer_frozen_blocks_and_an_average(frozen, averaged, precision) -> None:
    engines = [classifier(impl, frozen, averaged, precision) for impl in ("fused_tail", "torch")]
    for step in range(5):
        losses = []
        for engine in engines:
            logits = engine.model(images_of(4) + 0.1 * step)
            engine.backward(torch.nn.functional.cross_entropy(logits.float(), torch.arange(4)))
            info = engine.step(hyper(step), step)
            if averaged:
                engine.update_target(0.9, info)
            losses.append(info.loss)
        assert float((losses[0] - losses[1]).abs()) <= (0 if precision == "fp32" else 2e-3)
    if precision == "fp32":
        assert same(*engines)
    if averaged:
        features = [engine.target(images_of(2)) for engine in engines]
        torch.testing.assert_close(*features, rtol=0, atol=0 if precision == "fp32" else 2e-2)


def test_an_update_without_a_step_moves_the_target_alone() -> None:
    engine = pretraining("fused_tail")
    info = type("Info", (), {"stopped": None})()
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.mul_(1.5)
    weight, old = engine.module.encoder.blocks[0].mlp.fc1.weight.detach().clone(), engine._shards[0][-1].clone()
    engine.update_target(0.5, info)
    assert torch.equal(engine.module.encoder.blocks[0].mlp.fc1.weight, weight)
    assert torch.equal(engine._shards[0][-1], torch.lerp(old, engine._shards[1][-1], 0.5))


def test_nothing_may_come_between_a_step_and_the_targets_update() -> None:
    engine = pretraining("fused_tail")
    engine.backward(engine.model(images_of(2), random_masks(1, 2, 2)).square().mean())
    engine.step(hyper(0), 0)
    with pytest.raises(AssertionError, match="the state can't be saved between step and update_target"):
        engine.pieces()
    with pytest.raises(AssertionError, match="update_target must follow each step"):
        engine.step(hyper(1), 1)


def test_a_weight_without_a_gradient_is_refused() -> None:
    engine = pretraining("fused_tail")
    engine.backward(engine.module.encoder(images_of(2)).square().mean())
    info = engine.step(hyper(0), 0)
    with pytest.raises(ValueError, match=r"\d+ of \d+ parameters have no gradient, but fused_tail moves all of them"):
        engine.update_target(0.9, info)


def test_it_is_refused_where_its_kernel_cannot_run(monkeypatch) -> None:
    monkeypatch.setattr(FusedTailAdamW, "implementation", "triton")
    with pytest.raises(ConfigError, match="impl is fused_tail but the device is cpu; its kernel needs CUDA: set optim"):
        pretraining("fused_tail")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="impl is fused_tail, which needs Triton .*; install triton, or set optimiz"):
        pretraining("fused_tail")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_is_refused_under_zero(stage) -> None:
    settings = EngineConfig(strategy="deepspeed", ds_config=f"ds_configs/zero{stage}.json")
    with pytest.raises(ConfigError, match=f"impl is fused_tail but the ZeRO stage is {stage}: ZeRO steps flat slices"):
        build_engine(WORLD, settings, AdamWConfig(impl="fused_tail"))

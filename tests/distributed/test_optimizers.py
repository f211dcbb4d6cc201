"""Optimisers other than AdamW: engines train as one process does, and checkpoints resume."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from torch.distributed.tensor.debug import CommDebugMode

from ijepa_scale.checkpoint import store
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, NonFiniteError
from ijepa_scale.optim.lars import LarsConfig
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES, loss_difference, worst
from tests.distributed.test_engines import reference as adamw_reference
from tests.distributed.training import full_state, make, masks_config, part

LARS = LarsConfig(trust_coefficient=20.0)  # large enough for progress at the schedule's learning rates
HALF, STEPS = 4, 8
PLAIN = (1, {"strategy": "plain"})


def curve(world: World, engine: dict, folder: str = "", first: int = 0, last: int = STEPS) -> dict:
    """Returns losses, norms and state of steps `first` to `last`, with checkpoints in `folder`."""
    built, step = make(world, EngineConfig(**engine, precision="fp32"), LARS, masks_config())
    if first:
        checkpoint = store.Checkpoint(Path(folder) / f"step-{first:08d}")
        checkpoint.load(built.pieces())
        built.loaded(checkpoint.step)
    infos = [step(part(index, world)) for index in range(first, last)]
    if folder:
        store.save(Path(folder), last, built.pieces(), world=world, extra={}, keep=9)
    losses = [float(world.mean(info.loss.clone())) for info in infos]
    return {"losses": losses, "norms": [float(i.grad_norm) for i in infos], "state": full_state(world, built)}


@functools.cache
def reference() -> dict:
    return run(curve, *PLAIN, alone=True)[0]


def agree(found: dict, expected: dict) -> None:
    assert loss_difference(found, expected) <= 1e-5
    assert worst(found, expected, "target.") <= 1e-6
    assert worst(found, expected, "model.") <= 1e-5
    assert worst(found, expected, "optimizer.momentum_buffer.") <= 1e-5


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-reshard", "hsdp"])
def test_lars_equals_one_process(name: str) -> None:
    expected = reference()
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]
    assert loss_difference(expected, adamw_reference(steps=STEPS)) > 1e-3
    assert not any(name.startswith("optimizer.exp") for name in expected["state"])
    for found in run(curve, *ENGINES[name]):
        agree(found, expected)


@pytest.mark.parametrize(("writer", "reader"), [("plain", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "plain")])
def test_lars_resumes_from_any_engine(writer: str, reader: str, tmp_path: Path) -> None:
    processes, engine = ENGINES.get(writer, PLAIN)
    run(curve, processes, engine, str(tmp_path), 0, HALF, alone=writer == "plain")
    processes, engine = ENGINES.get(reader, PLAIN)
    found = run(curve, processes, engine, str(tmp_path), HALF, alone=reader == "plain")[0]
    agree(found, {**reference(), "losses": reference()["losses"][HALF:]})


def read_by_adamw(world: World, folder: str) -> str:
    built, _ = make(world, EngineConfig(strategy="plain"), AdamWConfig(), masks_config())
    try:
        store.Checkpoint(store.newest(Path(folder))).load(built.pieces())
    except CheckpointError as error:
        return str(error)
    return ""


def test_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    run(curve, *PLAIN, str(tmp_path), 0, 1, alone=True)
    text = run(read_by_adamw, 1, str(tmp_path), alone=True)[0]
    assert "optimizer.exp_avg.encoder.patch_embed.proj.weight is missing" in text


def reductions(world: World, engine: dict) -> int:
    """Returns the number of collectives in the optimiser's step."""
    built, step = make(world, EngineConfig(**engine, precision="fp32"), LARS, masks_config())
    step(part(0, world))
    for parameter in built.module.parameters():
        parameter.grad = parameter.detach().clone()
    with CommDebugMode() as counted:
        built.optimizer.step()
    return counted.get_total_counts()


def test_lars_reduces_the_norms_of_a_group_at_once() -> None:
    assert run(reductions, *ENGINES["fsdp2"]) == [2, 2]  # one for each of the two groups that decay


def stopped(world: World, engine: dict) -> tuple[str, bool]:
    """Returns the error that a NaN raised one step later, and whether any state changed."""
    built, step = make(world, EngineConfig(**engine, precision="fp32"), LARS, masks_config())
    built._watch = FiniteWatch(world, late=True)
    step(part(0, world))
    before = full_state(world, built)
    try:
        assert step(part(1, world, spoil=(1, world.size - 1))).stopped == 1.0
        step(part(2, world))
    except NonFiniteError as error:
        after = full_state(world, built)
        return str(error), any(not before[name].equal(after[name]) for name in before)
    return "", True


@pytest.mark.parametrize("name", ["plain", "ddp", "fsdp2"])
def test_a_stopped_step_changes_nothing(name: str) -> None:
    processes, engine = ENGINES.get(name, PLAIN)
    for message, moved in run(stopped, processes, engine, alone=name == "plain"):
        assert f"step 1: process {processes - 1} has loss nan" in message
        assert not moved

"""The training step on one GPU: agreement with the CPU, no synchronisation, checkpoints. Run: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ijepa_scale.checkpoint import store
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.world import World
from tests.distributed.harness import run
from tests.distributed.training import curve, full_state, make, masks_config, part

pytestmark = pytest.mark.gpu
STEPS = 20


def world(kind: str) -> World:
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device(kind))


def losses(kind: str, impl: str = "auto", **engine: object) -> list[float]:
    settings = EngineConfig(**{"strategy": "plain", "precision": "fp32", "compile": False, **engine})
    _, step = make(world(kind), settings, AdamWConfig(impl=impl), masks_config())
    return [float(step(part(index, world(kind))).loss) for index in range(STEPS)]


def test_fp32_agrees_with_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found, expected = losses("cuda:0"), losses("cpu")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-4  # different kernels, over 20 steps


CHANGES = (
    {}, {"accumulation": 2}, {"checkpointing": "full"}, {"compile": True}, {"target_precision": "fp8", "compile": True},
    {"triton": ("target_loss", "target_update")},
    {"compile": True, "triton": ("target_loss", "target_update")},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_bf16_is_close_to_fp32(change: dict) -> None:
    found, expected = losses("cuda:0", precision="bf16", **change), losses("cuda:0")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-2
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize(
    "change",
    [{}, {"compile": True}, {"checkpointing": "selective"}, {"target_precision": "fp8", "compile": True}],
    ids=str,
)
def test_the_fused_tail_trains_the_same(change: dict) -> None:
    found, expected = losses("cuda:0", impl="fused_tail"), losses("cuda:0")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-4
    found = losses("cuda:0", impl="fused_tail", precision="bf16", **change)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-2


def steps_without_waiting(world: World, engine: dict, masks: dict, impl: str = "auto") -> list[float]:
    """Returns the losses of steps that fail if anything makes the host wait."""
    settings = EngineConfig(**{"compile": False, **engine}, precision="bf16")
    _, step = make(world, settings, AdamWConfig(impl=impl), masks_config(**masks))
    batches = [part(index, world).to(world.device) for index in range(6)]
    found = [step(batch).loss for batch in batches[:3]]  # compiles kernels, and creates optimiser states
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [step(batch).loss for batch in batches[3:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [float(loss) for loss in found]


STEP_CHANGES = ({}, {"accumulation": 2}, {"compile": True}, {"target_precision": "fp8", "compile": True})


@pytest.mark.parametrize("context", ["truncate", "packed"])
@pytest.mark.parametrize("change", STEP_CHANGES, ids=str)
@pytest.mark.parametrize("strategy", ["plain", "ddp", "fsdp2"])
def test_the_step_does_not_synchronise(strategy: str, change: dict, context: str) -> None:
    if strategy == "fsdp2" and change.get("target_precision"):
        pytest.skip("fp8 is refused for sharded weights")
    found = run(steps_without_waiting, 1, {"strategy": strategy, **change}, {"context": context}, device="cuda:0")[0]
    assert all(0 < loss < 1 for loss in found)


@pytest.mark.parametrize("strategy", ["plain", "ddp", "fsdp2"])
def test_the_fused_tail_does_not_synchronise(strategy: str) -> None:
    engine = {"strategy": strategy, **({} if strategy == "fsdp2" else {"target_precision": "fp8", "compile": True})}
    found = run(steps_without_waiting, 1, engine, {}, "fused_tail", device="cuda:0")[0]
    assert all(0 < loss < 1 for loss in found)


@pytest.mark.parametrize("impl", ["auto", "fused_tail"])
@pytest.mark.parametrize("strategy", ["plain", "ddp", "fsdp2"])
def test_a_bad_step_stops_on_the_device(strategy: str, impl: str) -> None:
    from tests.distributed.test_engines import spoiled_step

    for late in (False, True):
        message, moved = run(spoiled_step, 1, {"strategy": strategy}, 1, late, impl, device="cuda:0")[0]
        assert "step 2: process 0 has loss nan" in message and not moved


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_wrapped_engines_on_one_gpu(strategy: str) -> None:
    engine: dict = {"strategy": strategy, "compile": False}
    if strategy.startswith("zero"):
        engine |= {"strategy": "deepspeed", "ds_config": f"ds_configs/{strategy}.json"}
    found = run(curve, 1, {**engine, "precision": "fp32"}, {}, {}, STEPS, device="cuda:0")[0]["losses"]
    expected = losses("cuda:0")
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-4


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    settings = EngineConfig(strategy="plain", precision="bf16", compile=False)
    built, step = make(world("cuda:0"), settings, AdamWConfig(), masks_config())
    for index in range(3):
        step(part(index, world("cuda:0")))
    path = store.save(tmp_path, 3, built.pieces(), world=world("cuda:0"), extra={}, keep=1)
    expected = step(part(3, world("cuda:0"))).loss
    other, again = make(world("cuda:0"), settings, AdamWConfig(), masks_config())
    store.Checkpoint(path).load(other.pieces())
    other.loaded(3)
    assert torch.equal(again(part(3, world("cuda:0"))).loss, expected)
    state = full_state(world("cuda:0"), other)
    assert all(torch.equal(value, state[name]) for name, value in full_state(world("cuda:0"), built).items())

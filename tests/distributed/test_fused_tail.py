"""The fused tail, with its eager implementation, trains like AdamW and the target's update on several processes."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from ijepa_scale.engine.world import World
from ijepa_scale.optim.fused_tail import FusedTailAdamW
from tests.distributed import test_engines, test_finetune_engines
from tests.distributed.harness import run
from tests.distributed.test_engines import BF16_LOSS, ENGINES, loss_difference, worst
from tests.distributed.training import curve

STEPS = 8


def longer(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


def eagerly(world: World, case: Any, *args: Any) -> Any:
    """Runs a case with the implementation that needs no GPU."""
    FusedTailAdamW.implementation = "eager"
    return case(world, *args)


@functools.cache
def plain(precision: str, clip: float | None) -> dict:
    engine = {"strategy": "plain", "precision": precision, "accumulation": 2}
    return run(curve, 1, engine, {"clip_norm": clip}, {}, STEPS, alone=True)[0]


@pytest.mark.parametrize(
    ("name", "clip"),
    [("ddp", 0.5), ("fsdp2", 0.5), longer("ddp", None), longer("fsdp2-reshard", None), longer("hsdp", None)],
)
def test_fp32_training_equals_one_process_with_adamw(name: str, clip: float | None) -> None:
    processes, engine = ENGINES[name]
    settings = {**engine, "precision": "fp32", "accumulation": 2}
    expected = plain("fp32", clip)
    for found in run(eagerly, processes, curve, settings, {"impl": "fused_tail", "clip_norm": clip}, {}, STEPS):
        assert loss_difference(found, expected) <= 1e-5
        assert worst(found, expected, "target.") <= 1e-6
        assert worst(found, expected, "model.") <= 1e-5
        assert worst(found, expected, "optimizer.exp_avg.") <= 1e-6
        assert worst(found, expected, "optimizer.exp_avg_sq.") <= 1e-8


@pytest.mark.parametrize("name", ["ddp", longer("fsdp2")])
def test_bf16_training_is_close_to_one_process_with_adamw(name: str) -> None:
    processes, engine = ENGINES[name]
    settings = {**engine, "precision": "bf16", "accumulation": 2}
    found = run(eagerly, processes, curve, settings, {"impl": "fused_tail"}, {}, STEPS)[0]
    expected, exact = plain("bf16", None), plain("fp32", None)
    assert loss_difference(found, expected) <= BF16_LOSS
    assert worst(found, expected, "target.") <= 5e-3
    assert loss_difference(found, exact) > 2e-5, "it does compute in bf16"


def compiled(world: World, engine: dict, steps: int) -> dict:
    """Returns a curve with compiled blocks."""
    return curve(world, {**engine, "compile": True, "precision": "bf16"}, {"impl": "fused_tail"}, {}, steps)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_train_with_the_tail(checkpointing: str) -> None:
    _, engine = ENGINES["ddp"]
    found = run(eagerly, 2, compiled, {**engine, "checkpointing": checkpointing}, 4)[0]
    losses = plain("bf16", None)["losses"][:4]
    assert max(abs(a - b) for a, b in zip(found["losses"], losses, strict=True)) <= BF16_LOSS


@pytest.mark.parametrize(
    ("name", "late"), [("ddp", True), ("fsdp2", True), longer("ddp", False), longer("fsdp2", False)]
)
def test_a_nan_on_one_process_changes_nothing(name: str, late: bool) -> None:
    processes, engine = ENGINES[name]
    case = functools.partial(test_engines.spoiled_step, impl="fused_tail")
    for message, moved in run(eagerly, processes, case, engine, 2 - late, late):
        assert f"step 2: process {processes - 1} has loss nan" in message
        assert not moved


@pytest.mark.parametrize(("name", "frozen"), [("fsdp2", 2), longer("fsdp2", 0), longer("ddp", 0), longer("ddp", 2)])
def test_finetuning_without_a_target(name: str, frozen: int) -> None:
    processes, engine = ENGINES[name]
    case = functools.partial(test_finetune_engines.curve, impl="fused_tail")
    for found in run(eagerly, processes, case, engine, frozen):
        test_finetune_engines.agree(found, test_finetune_engines.reference(frozen))

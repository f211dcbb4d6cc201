"""The precision of each part of a step, the target's bf16 and fp8 copies, and resuming in bf16 and fp8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ijepa_kernels.fp8_linear import FP8, quantise_rows
from ijepa_scale.checkpoint import store
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.registry import build_jepa, build_target
from tests.distributed.harness import run
from tests.distributed.training import MODEL, full_state, images_of, make, masks_config, part

PLAIN = (1, {"strategy": "plain"})
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": PLAIN,
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "hsdp": (4, {"strategy": "fsdp2", "replicas": 2}),
    **{f"zero{n}": (2, {"strategy": "deepspeed", "ds_config": f"ds_configs/zero{n}.json"}) for n in (1, 2, 3)},
}


def parts_of(built: Engine) -> dict[str, nn.Module]:
    return {"model": built.module, "target": built.target_module}  # type: ignore[attr-defined]


def dtypes_of(world: World, engine: dict) -> dict[str, dict[str, set[str]]]:
    """Returns, for training, evaluation and target, the dtypes of linear layers' outputs and of the residual stream."""
    built, step = make(world, EngineConfig(**engine), AdamWConfig(), masks_config())
    found: dict[str, dict[str, set[str]]] = {}
    phase = ""

    def record(kind: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(phase or ("training" if torch.is_grad_enabled() else "target"), {}).setdefault(
                kind, set()
            ).add(str(output.dtype))

        return hook

    for root in parts_of(built).values():
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(record("products"))
            elif name.rpartition(".")[2].isdigit():  # a block
                module.register_forward_hook(record("stream"))
    step(part(0, world))
    (micro,) = part(1, world).split(1)
    masks, _ = step.masks(1, micro.position, len(micro), len(micro) * world.size)
    phase = "evaluation"
    built.evaluate(images_of(micro), masks)
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_products_run_in_the_engines_precision_and_the_stream_in_fp32(name: str) -> None:
    processes, engine = ENGINES[name]
    for precision, dtype in (("bf16", "torch.bfloat16"), ("fp32", "torch.float32")):
        expected = {"products": {dtype}, "stream": {"torch.float32"}}
        for found in run(dtypes_of, processes, {**engine, "precision": precision}, alone=name == "plain"):
            assert found == {"training": expected, "target": expected, "evaluation": expected}


def reductions(world: World, engine: dict) -> list[tuple[str, str, str, bool]]:
    """Returns, for each FSDP2 module: weight and reduction dtype of its policy, real reduction dtype, input casts."""
    built, step = make(world, EngineConfig(**engine), AdamWConfig(), masks_config())
    step(part(0, world))
    found = []
    for root in parts_of(built).values():
        for module in root.modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                assert group is not None
                policy = group.mp_policy
                real = group._reduce_dtype  # None without gradients, or if it equals their dtype
                found.append((str(policy.param_dtype), str(policy.reduce_dtype), str(real), policy.cast_forward_inputs))
    return found


def test_fsdp2_gathers_in_bf16_and_reduces_in_fp32() -> None:
    for name in ("fsdp2", "hsdp"):
        processes, engine = ENGINES[name]
        for found in run(reductions, processes, {**engine, "precision": "bf16"}):
            model, target = found[:6], found[6:]  # model: a root and 3 + 2 blocks; target: a root and 3 blocks
            assert model == [("torch.bfloat16", "torch.float32", "torch.float32", False)] * 6
            assert target == [("torch.bfloat16", "torch.float32", "None", False)] * 4


SAVED, LAST = 3, 6
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain bf16": (1, {"strategy": "plain"}),
    "plain fp8": (1, {"strategy": "plain", "target_precision": "fp8"}),
    "ddp fp8": (2, {"strategy": "ddp", "target_precision": "fp8"}),
    "zero1 bf16": ENGINES["zero1"],
    "zero1 fp8": (2, {**ENGINES["zero1"][1], "target_precision": "fp8"}),
    "zero3 bf16": ENGINES["zero3"],
}


def resumed_losses(world: World, engine: dict, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Returns the losses after the save: uninterrupted, of a new engine that loads it, and of one that doesn't."""
    settings = EngineConfig(**engine, precision="bf16")
    built, step = make(world, settings, AdamWConfig(), masks_config())
    for index in range(SAVED):
        step(part(index, world))
    path = store.save(Path(folder), SAVED, built.pieces(), world=world, extra={}, keep=1)
    fresh, fresh_step = make(world, settings, AdamWConfig(), masks_config(), seed=11)
    fresh.target(images_of(part(0, world)))  # gathers weights, which loading makes stale
    store.Checkpoint(path).load(fresh.pieces())
    fresh.loaded(SAVED)
    _, other_step = make(world, settings, AdamWConfig(), masks_config(), seed=11)
    steps = range(SAVED, LAST)
    whole, loaded, other = ([float(s(part(i, world)).loss) for i in steps] for s in (step, fresh_step, other_step))
    states = full_state(world, built), full_state(world, fresh)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return whole, loaded, other


@pytest.mark.parametrize("name", RUNS)
def test_losses_after_loading_are_those_of_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    processes, engine = RUNS[name]
    for whole, loaded, other in run(resumed_losses, processes, engine, str(tmp_path), alone=name.startswith("plain")):
        assert loaded == whole  # bit for bit, even with 2 processes, since their sums have two terms
        assert abs(other[0] - whole[0]) > 1e-2  # weights that weren't loaded would make a difference


def refusal(world: World, engine: dict) -> str:
    try:
        make(world, EngineConfig(**engine, precision="bf16", target_precision="fp8"), AdamWConfig(), masks_config())
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "what"), [("zero3", "the ZeRO stage is 3"), ("fsdp2", "strategy is fsdp2")])
def test_fp8_is_refused_for_sharded_weights(name: str, what: str) -> None:
    for text in run(refusal, *ENGINES[name]):
        assert text == (
            f"engine.target_precision is fp8 but {what}: sharded weights are gathered in bf16; "
            "set engine.target_precision=null, or use ddp or ZeRO-1/2"
        )


def copies_of(built: Engine) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, fp32 value, fp32 value of the copy) for each weight with a bf16 or fp8 copy."""
    pieces = [p for p in built.pieces() if p.name.startswith("target.")]
    values = {p.name.removeprefix("target."): p.tensor.view(p.shape) for p in pieces}
    for prefix, module in parts_of(built)["target"].named_modules():
        for name in ("weight", "bias"):
            used = getattr(module, name, None)
            if used is not None and used.dtype == FP8:
                yield f"{prefix}.{name}", values[f"{prefix}.{name}"], used.float() * module.weight_scale
            elif used is not None and used.dtype == torch.bfloat16:
                yield f"{prefix}.{name}", values[f"{prefix}.{name}"], used.float()


def follow(world: World, engine: dict, steps: int) -> list[tuple[int, int, int]]:
    """Returns, after each step, the numbers of fp8 copies, of bf16 copies and of fp8 copies that changed.

    Checks that each copy is the rounding of the current value.
    """
    built, step = make(world, EngineConfig(**engine, precision="bf16"), AdamWConfig(), masks_config())
    before: dict[str, Tensor] = {}
    found = []
    for index in range(steps):
        step(part(index, world))
        quantised = rounded = moved = 0
        for name, value, used in copies_of(built):
            if ".weight" in name and ".blocks." in f".{name}" and engine.get("target_precision") == "fp8":
                digits, scale = quantise_rows(value)
                assert torch.equal(used, digits.float() * scale), f"step {index}: {name} is not its value, rounded"
                quantised += 1
                moved += name in before and not torch.equal(used, before[name])
                before[name] = used.clone()
            else:
                assert torch.equal(used, value.bfloat16().float()), f"step {index}: {name} is not its value, rounded"
                rounded += 1
        found.append((quantised, rounded, moved))
    return found


@pytest.mark.parametrize("name", ["plain fp8", "ddp fp8", "zero1 fp8", "plain bf16"])
def test_the_targets_copies_follow_its_values(name: str) -> None:
    processes, engine = RUNS[name]
    weights = 3 * 4 if "fp8" in name else 0  # 3 blocks of 4 linear layers; biases and patch embedding have bf16 copies
    for found in run(follow, processes, engine, 4, alone=name.startswith("plain")):
        assert [(quantised, rounded) for quantised, rounded, _ in found] == [(weights, 2 * 13 - weights)] * 4
        assert [moved for *_, moved in found] == [0, *[weights] * 3]


def output_after_steps(world: World, engine: dict) -> tuple[float, float]:
    """Returns the difference of the target's output after some steps to the one before, and to that of a fresh copy."""
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(lr=1e-2), masks_config())
    images = images_of(part(9, world))
    before = built.target(images).clone()
    for index in range(3):
        step(part(index, world))
        built.target(images)  # as the online evaluation does: gathers weights, which the next update makes stale
    alone = build_target(build_jepa(MODEL, seed=11))
    kept = {n.removeprefix("target."): t for n, t in full_state(world, built).items() if n.startswith("target.")}
    alone.load_state_dict({n: kept[n].view(p.shape) for n, p in alone.named_parameters()}, strict=False)
    after = built.target(images)
    return float((after - before).abs().max()), float((after - alone(images)).abs().max())


FOLLOWING = {name: ENGINES[name] for name in ("plain", "ddp", "fsdp2", "zero1", "zero3")} | {
    f"zero3{kind}": (2, {"strategy": "deepspeed", "ds_config": f"ds_configs/zero3{kind}.json"})
    for kind in ("_small", "_offload")
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_the_targets_output_is_that_of_its_values_after_updates(name: str) -> None:
    """Of all its values: where a part of the weights stayed gathered, the rest would still move the output."""
    for change, difference in run(output_after_steps, *FOLLOWING[name], alone=name == "plain"):
        assert change > 1e-3 and difference <= 1e-5

"""The target of engines that replicate it: fp32 values, and the bf16 or fp8 copies that it computes with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ijepa_kernels.fp8_linear import fp8_linear
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.target import ReplicatedTarget, check_fp8
from ijepa_scale.engine.target_update import TargetUpdate
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models import build_target, fp8
from ijepa_scale.models.fp8 import Fp8Linear
from tests.unit.models.packing_by_hand import images_of, random_masks, small_jepa

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


def moved(target: ReplicatedTarget) -> None:
    """Updates the target towards other values."""
    source = [value * 1.5 + 0.1 for value in target.shards]
    TargetUpdate()(target.shards, source, 0.5, copies=target.copies)
    target.updated()


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_copies_give_the_result_of_autocast_with_fp32_weights(compiled) -> None:
    module = build_target(small_jepa())
    exact, target = copy.deepcopy(module), ReplicatedTarget(module, precision="bf16")
    if compiled:
        for block in target.module.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    patches = random_masks(1, 1, 2).context[0]
    for _ in range(2):
        with AUTOCAST:
            assert torch.equal(target.module(images_of(2)), exact(images_of(2)))
            assert torch.equal(target.module(images_of(2), wanted=patches), exact(images_of(2), wanted=patches))
        moved(target)
        exact.load_state_dict({**exact.state_dict(), **target.values})


def test_values_stay_fp32_and_change_by_less_than_bf16_can_resolve() -> None:
    target = ReplicatedTarget(build_target(small_jepa()), precision="bf16")
    before = [value.clone() for value in target.shards]
    assert all(value.dtype == torch.float32 for value in before)
    for _ in range(3):
        TargetUpdate()(target.shards, [value + 1e-4 for value in before], 0.9, copies=target.copies)
    for value, start in zip(target.shards, before, strict=True):
        torch.testing.assert_close(value - start, torch.full_like(start, 1e-4 * (1 - 0.9**3)), atol=2e-6, rtol=0)
    assert target.module.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert target.module.blocks[0].norm1.weight.dtype == torch.float32


@torch.no_grad()
def test_fp8_features_are_near_bf16_ones_and_follow_the_values() -> None:
    module = build_target(small_jepa(shake=0.02))
    exact, target = copy.deepcopy(module), ReplicatedTarget(module, precision="fp8")
    assert isinstance(module.blocks[0].attn.qkv, Fp8Linear) and list(target.values) == [
        n for n, _ in exact.named_parameters()
    ]
    for _ in range(2):
        mean, least = target.compare(images_of(4))
        with AUTOCAST:
            expected = torch.nn.functional.cosine_similarity(target.module(images_of(4)), exact(images_of(4)), dim=-1)
        assert (mean, least) == pytest.approx((expected.mean().item(), expected.min().item()), abs=1e-6)
        assert 0.99 < least <= mean < 1.0, "close but not equal, since the computation differs"
        moved(target)
        exact.load_state_dict({**exact.state_dict(), **target.values})


def test_loaded_values_reach_every_copy() -> None:
    for precision in ("bf16", "fp8"):
        target = ReplicatedTarget(build_target(small_jepa()), precision=precision)
        fresh = ReplicatedTarget(build_target(small_jepa(shake=0.1)), precision=precision)
        for value, other in zip(target.shards, fresh.shards, strict=True):
            value.copy_(other)
        target.loaded()
        with AUTOCAST, torch.no_grad():
            assert torch.equal(target.module(images_of(2)), fresh.module(images_of(2)))


def test_inexact_fp8_features_are_refused(caplog) -> None:
    target = ReplicatedTarget(build_target(small_jepa(shake=0.02)), precision="fp8")
    with caplog.at_level("INFO"):
        check_fp8(target, images_of(4), WORLD)
    assert "fp8 and bf16 features: mean " in caplog.text and "(at least 0.999 required)" in caplog.text
    target.module.blocks[0].mlp.fc1.weight_scale.mul_(-3.0)
    with pytest.raises(
        ConfigError, match=r"too low \(mean 0\.\d+, minimum .*\); expected a mean of at least 0.999; set engine.target"
    ):
        check_fp8(target, images_of(4), WORLD)


@pytest.mark.parametrize("fast", [False, True])
def test_fast_accumulation_reaches_every_fp8_product_and_the_comparison(fast, monkeypatch) -> None:
    found: list[bool] = []

    def recorded(*given, fast_accumulation):
        found.append(fast_accumulation)
        return fp8_linear(*given, fast_accumulation=fast_accumulation)

    monkeypatch.setattr(fp8, "fp8_linear", recorded)
    config = EngineConfig(strategy="plain", target_precision="fp8", fp8_fast_accumulation=fast)
    engine: Any = build_engine(WORLD, config, AdamWConfig())
    jepa = small_jepa(shake=0.02)
    engine.prepare(jepa, build_target(jepa))
    engine.target(images_of(2))
    assert found == [fast] * 4 * 2  # each block's
    engine.check_fp8(images_of(2))
    assert found == [fast] * 4 * 2 * 2
    with pytest.raises(ConfigError, match="fp8_fast_accumulation is true but target_precision is null; set fp8_fast"):
        EngineConfig(fp8_fast_accumulation=True)


def test_triton_kernels_are_refused_on_the_cpu() -> None:
    config = EngineConfig(strategy="plain", triton=["target_loss"])
    assert config.triton == ("target_loss",)
    with pytest.raises(ConfigError, match=r"triton names target_loss but the device is cpu; .* set engine.triton=\[\]"):
        build_engine(WORLD, config, AdamWConfig())
    with pytest.raises(ConfigError, match="engine.triton is 'crop'; choose one of target_loss, target_update"):
        EngineConfig(triton="crop")


def test_fp8_is_refused_for_sharded_weights_and_for_fp32() -> None:
    with pytest.raises(ConfigError, match="target_precision is fp8 but precision is fp32; set precision=bf16"):
        EngineConfig(target_precision="fp8", precision="fp32")
    engine = build_engine(WORLD, EngineConfig(strategy="fsdp2", target_precision="fp8"), AdamWConfig())
    jepa = small_jepa()
    with pytest.raises(
        ConfigError, match="target_precision is fp8 but strategy is fsdp2: sharded weights are gathered"
    ):
        engine.prepare(jepa, build_target(jepa))
    zero = build_engine(
        WORLD, EngineConfig(strategy="deepspeed", ds_config="ds_configs/zero3.json", target_precision="fp8"),
        AdamWConfig(),
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match="target_precision is fp8 but the ZeRO stage is 3: sharded weights are gathered"
    ):
        zero.prepare(jepa, build_target(jepa))

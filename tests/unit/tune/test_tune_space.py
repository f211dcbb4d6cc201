"""The candidates of a configuration, and those that the plan rules out."""

from __future__ import annotations

import pytest

from ijepa_scale.config import EngineConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.tune.space import Space
from ijepa_scale.tune.worst import Lengths
from tests.unit.tune.tune_stubs import DS_CONFIGS, config, machine, space


def test_only_how_the_step_is_computed_changes() -> None:
    found = space()
    changed = found.config_of(found.candidate(found.engine, 8, checkpointing="full", compile=True))
    assert changed.engine == found.engine.replace(accumulation=8, checkpointing="full", compile=True, strategy="plain")
    assert changed.replace(engine=found.config.engine) == found.config


def test_micro_batches_divide_the_share_and_shrink_by_at_least_a_third() -> None:
    assert space(config(batch=64)).micro_batches() == [64, 32, 16, 8, 4, 2, 1]
    assert space(config(batch=72), machine(processes=2)).micro_batches() == [36, 18, 12, 6, 4, 2, 1]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="not divisible by 3 processes x accumulation 1; try data.batch_size=63"):
        space(config(accumulation=5), machine(processes=3))


def test_one_process_strategy_is_refused_for_several() -> None:
    message = "engine.strategy is plain but 2 processes are requested; set engine.strategy=auto, or tune with one"
    with pytest.raises(ConfigError, match=message):
        space(config(strategy="plain"), machine(processes=2))


def test_the_plan_leaves_out_what_cannot_fit() -> None:
    settings = config(batch=2048, model="vit_huge", precision="bf16")
    found = space(settings, machine(kind="cuda", gigabytes=80))
    whole = found.candidate(found.engine, 2048)
    reason = found.planned_out(whole)
    assert reason is not None and reason.startswith("needs ") and reason.endswith(" of 80.0 GB by the plan")
    assert found.planned_out(found.candidate(found.engine, 8)) is None
    full = found.candidate(found.engine, 2048, checkpointing="full")
    assert found.needed(full) < 0.5 * found.needed(whole)
    shorter = space(settings, machine(kind="cuda", gigabytes=80), Lengths(context=60, target=30))
    assert shorter.needed(whole) < 0.7 * found.needed(whole)  # because the longest masks count


def test_sharding_needs_less() -> None:
    found = space(config(batch=64, model="vit_huge"), machine(kind="cuda", processes=8, gigabytes=80))
    spreads = dict(found.spreads(found.engine))
    assert list(spreads) == ["ddp", "fsdp2", "fsdp2 reshard", "zero1", "zero2", "zero3"]
    needs = {}
    for name, settings in spreads.items():
        assert isinstance(settings, dict)
        candidate = found.candidate(found.engine, 1, **settings)
        assert candidate.spread == name
        needs[name] = found.needed(candidate)
    assert needs["fsdp2 reshard"] < needs["fsdp2"] < needs["ddp"] and needs["zero3"] < needs["zero1"]


def test_settings_of_zero_and_of_the_compiler_are_dropped_with_them() -> None:
    settings = {"precision": "bf16", "ds_config": f"{DS_CONFIGS}/zero2.json", "zero_communication": "bf16"}
    found = space(config(**settings), machine(kind="cuda", processes=8, gigabytes=80))
    spreads = dict(found.spreads(found.engine))
    sent = {n: found.candidate(found.engine, 8, **spreads[n]).engine.zero_communication for n in ("ddp", "zero3")}
    assert sent == {"ddp": "fp32", "zero3": "bf16"}
    compiled = EngineConfig(strategy="plain", compile=True, compile_cache="kernels")
    assert found.candidate(compiled, 8, compile=False).engine.compile_cache is None
    assert found.candidate(compiled, 8, checkpointing="full").engine.compile_cache == "kernels"


def test_one_process_has_nothing_to_spread_and_missing_files_are_reported() -> None:
    assert list(space().spreads(EngineConfig())) == []
    bare = space(config(), machine(processes=2))
    bare._ds_configs = DS_CONFIGS / "nowhere"
    assert dict(bare.spreads(bare.engine))["zero1"] == f"{DS_CONFIGS}/nowhere/zero1.json doesn't exist"


def test_attention_kernels_are_those_of_the_device() -> None:
    assert list(space().attentions("flash", "auto")) == [
        ("flash", "attention auto is flash on this machine"),
        ("math", None),
    ]
    on_gpu = space(config(), machine(kind="cuda"))
    assert [name for name, same in on_gpu.attentions("flash", "auto") if same is None] == ["cudnn", "efficient"]


def test_a_deepspeed_file_without_a_stage_is_left_to_the_engine(tmp_path: object) -> None:
    settings = config(strategy="deepspeed", ds_config=f"{tmp_path}/none.json")
    found = Space(settings, machine(gigabytes=1e-3), Lengths(context=10, target=5))
    assert found.planned_out(found.candidate(found.engine, 64)) is None


def test_fewer_features_are_simpler() -> None:
    found = space(config(), machine(processes=2))
    plain = found.candidate(found.engine, 32)
    others = [
        found.candidate(found.engine, 32, checkpointing="selective"),
        found.candidate(found.engine, 32, compile=True),
        found.candidate(found.engine, 32, strategy="fsdp2"),
        found.candidate(found.engine, 32, attention="math"),
        found.candidate(found.engine, 16),
    ]
    keys = [each.simplicity(found.config.engine) for each in others]
    assert all(plain.simplicity(found.config.engine) < key for key in keys) and keys == sorted(keys, reverse=True)

"""DeepSpeed files: all files of ds_configs/ work, and refusals give their reasons."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.engine.ds_config import FORCED_STAGE3, OWNED, compose, load_ds_config
from ijepa_scale.errors import ConfigError

FILES = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3, "zero3_small": 3}


def refusal(folder: Path, content: Any) -> list[str]:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_ds_config(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


def test_all_files_are_listed_here() -> None:
    assert {path.stem for path in FILES} == set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_becomes_a_configuration_that_deepspeed_accepts(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plan = load_ds_config(path)
    before = copy.deepcopy(plan)
    settings = compose(plan, micro_batch=4, accumulation=2, clip_norm=None, precision="bf16", world=1)
    assert plan == before
    read = DeepSpeedConfig(copy.deepcopy(settings))
    assert read.zero_config.stage == STAGES[path.stem]
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (8, 4, 2)
    assert read.gradient_clipping == 0.0
    assert read.torch_autocast_enabled and not read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.zero_allow_untested_optimizer and not read.zero_force_ds_cpu_optimizer
    assert read.optimizer_name is None and read.steps_per_print is None
    if STAGES[path.stem] == 3:
        assert read.zero_config.memory_efficient_linear is False
        assert read.zero_config.param_persistence_threshold == 0
    offload = read.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ("offload" in path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_sets_its_buckets(path: Path) -> None:
    """DeepSpeed's documented and actual defaults differ, so files must not rely on them."""
    settings = json.loads(path.read_text())["zero_optimization"]
    wanted = {"stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"}
    if settings["stage"] < 3:
        wanted |= {"allgather_bucket_size", "allgather_partitions", "round_robin_gradients"}
    else:
        wanted |= {f"stage3_{name}" for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")}
        wanted |= {*FORCED_STAGE3, "zero_hpz_partition_size", "sub_group_size"}
    assert wanted <= set(settings)


def test_compose_sets_the_global_batch_size_and_clipping() -> None:
    settings = compose(zero(3), micro_batch=3, accumulation=2, clip_norm=1.5, precision="fp32", world=4)
    assert settings["train_batch_size"] == 24
    assert settings["gradient_clipping"] == 1.5
    assert settings["torch_autocast"]["enabled"] is False
    assert settings["zero_optimization"]["memory_efficient_linear"] is False
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert "optimizer" not in settings and "bf16" not in settings


@pytest.mark.parametrize("stage", [1, 2])
def test_lower_stages_get_no_stage3_settings(stage: int) -> None:
    settings = compose(zero(stage), micro_batch=1, accumulation=1, clip_norm=None, precision="fp32", world=1)
    assert settings["zero_optimization"] == {"stage": stage}


@pytest.mark.parametrize("key", OWNED)
def test_settings_of_the_yaml_are_refused_with_their_field(tmp_path: Path, key: str) -> None:
    assert refusal(tmp_path, {**zero(1), key: 1}) == [
        f"{key} is set by the YAML ({OWNED[key]}); remove it from this file"
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (zero(0), "zero_optimization.stage is 0, which is plain data parallelism; use engine.strategy=ddp"),
        ({}, "zero_optimization.stage is missing; write 1, 2 or 3, or use engine.strategy=ddp"),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing; write 1, 2 or 3, or use engine.strategy=ddp"),
        (zero(4), "zero_optimization.stage is 4; write 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True; write 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization.stage is True; write 1, 2 or 3"),
        ({**zero(1), "wall_clock_brakdown": True}, "wall_clock_brakdown: unknown; did you mean wall_clock_breakdown?"),
        (
            {**zero(1), "qqq": 1},
            "qqq: unknown; choose one of zero_optimization, comms_logger, dump_state, memory_breakdown, "
            "steps_per_print, wall_clock_breakdown",
        ),
        (
            {**zero(3), "stage3_max_live_parameters": 1},
            "stage3_max_live_parameters has no effect outside zero_optimization; move it there",
        ),
        (
            zero(2, overlap_com=True),
            "zero_optimization.overlap_com: unknown to DeepSpeed; did you mean overlap_comm?",
        ),
        (zero(2, qqq=1), "zero_optimization.qqq: unknown to DeepSpeed; remove it"),
        (
            zero(3, prefetch_bucket_size=1),
            "zero_optimization.prefetch_bucket_size: unknown to DeepSpeed; did you mean stage3_prefetch_bucket_size?",
        ),
        (
            zero(2, stage3_prefetch_bucket_size=1),
            "zero_optimization.stage3_prefetch_bucket_size has no effect under stage 2; remove it",
        ),
        (zero(1, sub_group_size=1), "zero_optimization.sub_group_size has no effect under stage 1; remove it"),
        (
            zero(2, cpu_offload=True),
            "zero_optimization.cpu_offload is deprecated; write offload_optimizer instead",
        ),
        (
            zero(1, reduce_bucket_size="auto"),
            "zero_optimization.reduce_bucket_size is 'auto', which only other trainers fill in; write a value",
        ),
        (
            zero(3, memory_efficient_linear=True),
            "zero_optimization.memory_efficient_linear is True; it must be false: with torch.compile it makes "
            "gradients of 3-D inputs zero",
        ),
        (
            zero(3, stage3_param_persistence_threshold=100000),
            "zero_optimization.stage3_param_persistence_threshold is 100000; it must be 0: parameters that stay "
            "gathered would hide the target encoder's updates",
        ),
        (
            zero(3, zero_hpz_partition_size=8),
            "zero_optimization.zero_hpz_partition_size is 8; write 1: secondary copies of the target encoder's "
            "weights would become stale",
        ),
        (
            zero(3, offload_param={"device": "cpu"}),
            'zero_optimization.offload_param can\'t be {"device": "cpu"} here: the target encoder\'s shards are '
            "updated on the device; use offload_optimizer",
        ),
        (
            zero(1, compute_grad_norm=False),
            "zero_optimization.compute_grad_norm can't be false here: the finite check and optimizer.clip_norm need "
            "the norm",
        ),
        (
            zero(2, offload_optimizer={"device": "nvme"}),
            "zero_optimization.offload_optimizer.device is 'nvme'; write 'cpu': the target's update can't read states "
            "on disk",
        ),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "zero_optimization.offload_optimizer needs DeepSpeed's own CPU Adam for super_offload or ratio; remove "
            "them",
        ),
        (
            zero(2, offload_optimizer={"device": "cpu", "pin_memry": True}),
            "zero_optimization.offload_optimizer.pin_memry: unknown to DeepSpeed; did you mean pin_memory?",
        ),
        (
            zero(1, overlap_comm="sometimes"),
            "zero_optimization.overlap_comm is 'sometimes'; input should be a valid boolean, unable to interpret input",
        ),
        (zero(1, reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size is -1; input should be greater than 0"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    assert refusal(tmp_path, content) == [text]


def test_one_message_lists_all_problems(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, {**zero(2, overlap_com=True, leaf_module={}), "fp16": {}, "x": 1})) == 5


def test_diagnostics_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**zero(1), "steps_per_print": 50, "wall_clock_breakdown": True}))
    settings = compose(load_ds_config(path), micro_batch=1, accumulation=1, clip_norm=None, precision="bf16", world=1)
    assert settings["steps_per_print"] == 50 and settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON (Expecting property name"),
        ("3", "holds a number; write a JSON object with zero_optimization"),
        ("[]", "holds a list; write a JSON object with zero_optimization"),
        ('{"a": 1, "a": 2}', "not readable as JSON (the key 'a' appears twice)"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text)[0].startswith(message)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="pipe.json: not readable as JSON .not a regular file.; fix it, or copy one"):
        load_ds_config(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="no.json: no such DeepSpeed file; use one of ds_configs/"):
        load_ds_config(tmp_path / "no.json")


def test_without_deepspeed_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.config", None)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero(1)))
    with pytest.raises(ConfigError, match="engine.strategy=deepspeed needs DeepSpeed, which can't be") as caught:
        load_ds_config(path)
    assert "pip install 'deepspeed>=0.19.8,<0.20', or use engine.strategy=fsdp2" in str(caught.value)

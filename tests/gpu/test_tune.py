"""Tuning on one GPU: out of memory is reported, and a small micro-batch is measured. Run: pytest -m gpu."""

from __future__ import annotations

import pytest
import torch

from ijepa_scale.config import DataConfig, EngineConfig, ModelConfig, PretrainConfig
from ijepa_scale.masks import MaskSampler
from ijepa_scale.tune.children import Children, Outcome
from ijepa_scale.tune.probe import StepJob, describe_machine, machine_of, measure_steps

pytestmark = pytest.mark.gpu
CONFIG = PretrainConfig(
    model=ModelConfig(name="vit_huge", patch_size=14),
    data=DataConfig(reader="synthetic", batch_size=4096, synthetic_samples=4096),
    engine=EngineConfig(strategy="plain", device="cuda", compile=False),
)


def measure(children: Children, config: PretrainConfig) -> Outcome:
    worst = MaskSampler(config.masks, config.model.grid, seed=0).longest()
    job = StepJob(config=config, devices=("cuda:0",), warmup=2, steps=3, worst=worst)
    return children.run(measure_steps, job, limit_s=300)


def test_out_of_memory_is_reported() -> None:
    children = Children()
    outcome = measure(children, CONFIG)
    assert outcome.kind == "memory" and outcome.reason.startswith("out of memory (in the first steps)")
    small = CONFIG.replace(model=ModelConfig(name="vit_small"), data=DataConfig(
        reader="synthetic", batch_size=16, synthetic_samples=64
    ))  # fmt: skip
    found = measure(children, small)
    assert found.kind == "done", found.reason
    values = found.values[0]
    assert 0 < values["peak_bytes"] <= values["worst_bytes"] and len(values["step_s"]) == 3


def test_a_child_process_describes_the_machine() -> None:
    outcome = Children().run(describe_machine, (CONFIG, ["cuda:0"], 1), limit_s=120)
    machine = machine_of(outcome.values[0])
    assert machine.kind == "cuda" and machine.memory_bytes == torch.cuda.get_device_properties(0).total_memory

"""Makes configurations, machines and outcomes for the tests of the search, without measuring anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ijepa_scale.config import BlockMaskConfig, DataConfig, EngineConfig, ModelConfig, PretrainConfig
from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.tune.children import Outcome
from ijepa_scale.tune.machine import Machine
from ijepa_scale.tune.ranking import Measurement
from ijepa_scale.tune.space import Candidate, Space

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"


def config(*, batch: int = 64, model: str = "vit_tiny", **engine: Any) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(name=model),
        masks=BlockMaskConfig(group_size=16),
        data=DataConfig(batch_size=batch),
        engine=EngineConfig(**engine),
    )


def machine(*, kind: str = "cpu", processes: int = 1, gigabytes: float = 16.0, **changes: Any) -> Machine:
    made = Machine(kind=kind, name="a device", processes=processes, cores=8, memory_bytes=1e9 * gigabytes)
    return dataclasses.replace(made, **changes)


def space(settings: PretrainConfig | None = None, at: Machine | None = None, worst: Lengths | None = None) -> Space:
    settings = settings or config()
    lengths = worst or MaskSampler(settings.masks, settings.model.grid, seed=0).longest()
    return Space(settings, at or machine(), lengths, DS_CONFIGS)


def done(step_s: float | list[float], *, peak: float = 1e9, worst: float = 2e9, attention: str = "flash") -> Outcome:
    steps = [step_s] * 5 if isinstance(step_s, float) else step_s
    values = {
        "step_s": steps,
        "wait_s": [0.0] * len(steps),
        "peak_bytes": peak,
        "worst_bytes": worst,
        "flops_per_image": 1e9,
        "attention": attention,
    }
    return Outcome(values=(values,), seconds=1.0)


def failed(kind: str, reason: str) -> Outcome:
    return Outcome(kind=kind, reason=reason)


def measured(candidate: Candidate, step_s: float | list[float], batch: int = 64) -> Measurement:
    return Measurement.of(candidate, batch, done(step_s).values)

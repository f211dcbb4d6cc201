"""What all engines do alike, through the engine: modes after an evaluation, checks that reach the run, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, NonFiniteError
from ijepa_scale.models import build_target
from tests.unit.models.packing_by_hand import images_of, random_masks, small_jepa

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


ZERO3 = {"strategy": "deepspeed", "ds_config": "ds_configs/zero3.json"}


def an_engine(**settings: Any) -> Any:
    engine: Any = build_engine(WORLD, EngineConfig(**{"strategy": "plain", **settings}), AdamWConfig())
    jepa = small_jepa(shake=0.02)
    engine.prepare(jepa, build_target(jepa))
    return engine


@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_restores_the_mode_even_if_it_fails(training: bool) -> None:
    engine, masks = an_engine(), random_masks(1, 2, 2)
    engine.module.train(training)
    engine.evaluate(images_of(2), masks)
    assert {part.training for part in engine.module.modules()} == {training}
    with pytest.raises(ValueError, match="this encoder takes"):
        engine.evaluate(images_of(2)[..., :16], masks)
    assert {part.training for part in engine.module.modules()} == {training}


def test_settling_reads_the_last_step() -> None:
    engine = an_engine()
    engine._watch = FiniteWatch(WORLD, late=True)  # as on a GPU
    engine._watch.check(4, torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match="step 4: process 0 has loss nan"):
        engine.settle()


def test_an_inexact_fp8_target_stops_the_run() -> None:
    engine = an_engine(precision="bf16", target_precision="fp8")
    engine.check_fp8(images_of(4))
    engine.target_module.blocks[0].mlp.fc1.weight_scale.mul_(-3.0)
    with pytest.raises(ConfigError, match="the cosine between the target's fp8 and bf16 features is too low"):
        engine.check_fp8(images_of(4))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"attention": "cudnn"}, "engine.attention cudnn needs a CUDA device"),
        ({"layer_norm": "apex"}, "engine.layer_norm is apex but the device is cpu"),
        ({**ZERO3, "cuda_graphs": True}, "cuda_graphs is true but the target's weights are sharded"),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_the_start(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        an_engine(**settings)

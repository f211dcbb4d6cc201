"""Compares the predicted peak memory of a step with the measured one, ViT-B/16 in bf16. Run: pytest -m gpu."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, ModelConfig, RegressionConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.world import World
from ijepa_scale.masks import MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.planning.footprint import footprint
from ijepa_scale.planning.spread import Spread
from ijepa_scale.planning.tokens import draw_masks, micro_batches
from ijepa_scale.train.step import TrainStep
from tests.distributed.training import SCHEDULE

pytestmark = pytest.mark.gpu
MODEL, BATCH, STEPS = ModelConfig(name="vit_base"), 64, 4


def _batch(step: int) -> Batch:
    return Batch(
        pixels=torch.zeros(BATCH, dtype=torch.uint8),
        sizes=np.full((BATCH, 2), 1),
        sample_ids=np.arange(BATCH),
        labels=torch.zeros(BATCH, dtype=torch.int64),
        step=step,
        epoch=0,
        position=0,
    )


@pytest.mark.parametrize("context", ["truncate", "packed"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_the_peak_is_within_a_tenth(checkpointing: str, context: str) -> None:
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cuda:0"))
    masks = BlockMaskConfig(context=context, group_size=BATCH)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    module = build_jepa(MODEL, seed=0)
    target = build_target(module)
    settings = EngineConfig(strategy="plain", precision="bf16", checkpointing=checkpointing, compile=False)
    engine = build_engine(world, settings, AdamWConfig())
    engine.prepare(module, target)
    generator = torch.Generator(device="cuda").manual_seed(0)
    train_step = TrainStep(
        engine,
        augment=lambda micro: torch.randn(BATCH, 3, 224, 224, device="cuda", generator=generator),
        masks=MaskSampler(masks, MODEL.grid, seed=0),
        schedule=SCHEDULE,
        objective=build_objective(RegressionConfig()),
        batch_size=BATCH,
        meters=Meters(world.device),
    )
    draws = draw_masks(masks, MODEL.grid, batch_size=BATCH)
    for step in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        train_step(_batch(step))
        measured = torch.cuda.max_memory_allocated() - before
        tokens = micro_batches(masks, draws[step : step + 1], MODEL.grid, BATCH)[0]
        predicted = footprint(MODEL, tokens, Spread(strategy="plain"), checkpointing=checkpointing)
        if step:  # the first step also creates the optimiser's states and the workspaces of libraries
            assert predicted.peak == pytest.approx(measured, rel=0.1), f"at the {predicted.moment}"

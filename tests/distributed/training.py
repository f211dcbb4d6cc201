"""A small I-JEPA training for the distributed tests, with the real masks and step but random images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ijepa_scale.checkpoint.writing import parts_to_write
from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, ModelConfig, RegressionConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.masks import MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.schedules import Schedule
from ijepa_scale.train.step import TrainStep

MODEL = ModelConfig(
    name="vit_tiny", image_size=32, patch_size=4, width=48, depth=3, heads=3, predictor_width=24, predictor_depth=2
)
BATCH = 8
SCHEDULE = Schedule(
    steps_per_epoch=10, epochs=10, warmup_epochs=1, ipe_scale=1.0, start_lr=2e-4, lr=2e-3, final_lr=1e-6,
    weight_decay=0.04, final_weight_decay=0.4, momentum=(0.9, 1.0),
)  # fmt: skip


def masks_config(**changes: Any) -> BlockMaskConfig:
    return BlockMaskConfig(**{"min_keep": 3, "group_size": BATCH, **changes})


def images_of(batch: Batch) -> torch.Tensor:
    """Replaces augmentation: returns the crops, scaled to [-2, 2]."""
    return (batch.pixels.view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 63.75 - 2.0).contiguous()


def part(step: int, world: World, *, spoil: tuple[int, int] | None = None) -> Batch:
    """Returns this process's part of the global batch of `step`; `spoil` = (step, process) adds NaNs."""
    generator = np.random.default_rng(step)
    images = torch.from_numpy(generator.integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8)).permute(0, 2, 3, 1)
    size = BATCH // world.size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    if spoil == (step, world.rank):
        images = images.float()
        images[rows] = float("nan")
    return Batch(
        pixels=images[rows].flatten(),
        sizes=np.full((size, 2), 32),
        sample_ids=np.arange(rows.start, rows.stop),
        labels=torch.zeros(size, dtype=torch.int64),
        step=step,
        epoch=0,
        position=rows.start,
    )


def make(
    world: World,
    engine: EngineConfig,
    optimizer: AdamWConfig,
    masks: BlockMaskConfig,
    *,
    objective: RegressionConfig | None = None,
    schedule: Schedule = SCHEDULE,
    seed: int = 3,
) -> tuple[Engine, TrainStep]:
    """Returns an engine with the model of `seed`, and the real step that uses it, with masks of seed 5."""
    module = build_jepa(MODEL, seed=seed)
    target = build_target(module)
    built = build_engine(world, engine, optimizer)
    built.prepare(module, target)
    step = TrainStep(
        built,
        augment=images_of,
        masks=MaskSampler(masks, MODEL.grid, seed=5),
        schedule=schedule,
        objective=build_objective(objective or RegressionConfig(), triton=engine.triton),
        batch_size=BATCH,
        meters=Meters(world.device),
    )
    return built, step


def full_state(world: World, engine: Engine) -> dict[str, torch.Tensor]:
    """Returns every full tensor that the engine would save, assembled from the pieces of all processes."""
    mine = [(p.name, p.start, p.tensor.clone(), p.shape) for p in parts_to_write(engine.pieces())]
    full: dict[str, torch.Tensor] = {}
    for pieces in world.gather_objects(mine):
        for name, start, tensor, shape in pieces:  # type: ignore[attr-defined]
            flat = full.setdefault(name, torch.full((int(np.prod(shape)),), float("nan")))
            flat[start : start + len(tensor)] = tensor
    return full


def curve(world: World, engine: dict, optimizer: dict, masks: dict, steps: int, state: bool = True) -> dict:
    """Returns the global losses and gradient norms of `steps` steps, and the state after them."""
    torch.manual_seed(0)
    built, step = make(world, EngineConfig(**engine), AdamWConfig(**optimizer), masks_config(**masks))
    losses, norms = [], []
    for index in range(steps):
        info = step(part(index, world))
        losses.append(float(world.mean(info.loss.clone())))
        norms.append(float(info.grad_norm))
    return {"losses": losses, "norms": norms, "state": full_state(world, built) if state else {}}

"""The two sides of the step benchmarks: our training step and the baseline, on synthetic images on the device.

Ours is the `TrainStep` of a training run with its engine; images on the device replace the augmentation. The baseline
gets the masks that ours draws for the same step. Both start with the same weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baseline import BaselineStep
from ijepa_scale import environment, rng
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.protocol import StepInfo
from ijepa_scale.engine.world import World
from ijepa_scale.masks import DenseMasks, Masks, MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models import build_jepa
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.registry import build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.planning.flops import mask_flops
from ijepa_scale.train.pretrain import build_schedule
from ijepa_scale.train.step import TrainStep

CONFIG = Path(__file__).parents[1] / "configs" / "base.yaml"
STEPS_PER_EPOCH = 625  # as in the published runs of 2048 images per step; learning rates are those of the first epoch


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose what is trained; all other settings are dotted overrides."""
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="images per process")
    parser.add_argument("--context", choices=("truncate", "packed"), default="truncate")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", choices=("none", "full", "selective"), default="none")
    parser.add_argument("--target", choices=("bf16", "fp8"), default="bf16", help="precision of the target's products")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", help="changes to our configuration: section.key=value")


def settings_of(options: argparse.Namespace, precision: str) -> list[str]:
    """Returns the flags as overrides; `masks.group_size` is the batch, so the whole batch shares one cut."""
    fixed = {
        "model.name": options.model,
        "model.image_size": options.image_size,
        "model.patch_size": options.patch_size,
        "masks.context": options.context,
        "masks.group_size": options.batch,
        "data.batch_size": options.batch,
        "data.reader": "synthetic",
        "schedule.steps_per_epoch": STEPS_PER_EPOCH,
        "engine.strategy": "plain",
        "engine.device": options.device,
        "engine.precision": precision,
        "engine.compile": str(options.compile).lower(),
        "engine.checkpointing": options.checkpointing,
    }
    if options.target == "fp8":
        fixed["engine.target_precision"] = "fp8"
    return [*(f"{key}={value}" for key, value in fixed.items()), *options.overrides]


def configured(settings: Sequence[str]) -> PretrainConfig:
    """Returns the base configuration with these overrides."""
    return load_config(CONFIG, settings)


def alone(device: torch.device) -> World:
    """Returns the world of a single process, with the allocator that training sets up on GPUs."""
    if device.type == "cuda":
        environment.export_allocator()
    return World(rank=0, size=1, local_rank=0, local_size=1, device=device)


def images_for(config: PretrainConfig, count: int, device: torch.device, *, first: int = 0) -> Tensor:
    """Returns images (count, C, H, W) fp32 of normal noise on the device, keyed by position from `first` on."""
    shape = (config.model.channels, *config.model.image_size)
    rows = [torch.randn(shape, generator=rng.generator(0, "benchmark", first + row)) for row in range(count)]
    return torch.stack(rows).to(device)


def batch_of(step: int, count: int, *, first: int = 0) -> Batch:
    """Returns a batch without pixels, whose positions in the global batch begin at `first`."""
    return Batch(
        pixels=torch.empty(0, dtype=torch.uint8),
        sizes=np.zeros((count, 2), dtype=np.int64),
        sample_ids=np.arange(first, first + count),
        labels=torch.full((count,), -1),
        step=step,
        epoch=0,
        position=first,
    )


class Draws:
    """The masks of each step, drawn once and cached. Both sides use them, and the FLOPs depend on them."""

    def __init__(self, config: PretrainConfig, device: torch.device, *, rank: int = 0, world: int = 1) -> None:
        self._config, self._device = config, device
        self._sampler = MaskSampler(config.masks, config.model.grid, seed=config.seed)
        assert config.data.batch_size is not None
        self.total, self.count = config.data.batch_size, config.data.batch_size // world
        self.first = rank * self.count
        self._kept: dict[int, Masks] = {}

    def __call__(self, step: int) -> Masks:
        """Returns the masks of this process's images at a step, on the device."""
        if step not in self._kept:
            masks = self._sampler(step, self.first, self.count, self.total)
            self._kept[step] = masks.map(lambda tensor: tensor.to(self._device))
        return self._kept[step]

    def flops(self, step: int) -> float:
        """Returns the FLOPs of a step for all images of this process."""
        return self.count * mask_flops(self._config.model, self(step), num_images=self.count).total


class Ours:
    """Our training step."""

    def __init__(self, config: PretrainConfig, module: JEPA, images: Tensor, *, world: World | None = None) -> None:
        world = alone(images.device) if world is None else world
        assert config.data.batch_size is not None
        trained = copy.deepcopy(module)
        target = build_target(trained)
        self.engine = build_engine(world, config.engine, config.optimizer)
        self.engine.prepare(trained, target)
        self.schedule = build_schedule(config, STEPS_PER_EPOCH)
        self.meters = Meters(world.device)
        self._first = world.rank * len(images)
        self._images = images
        self._step = TrainStep(
            self.engine,
            augment=lambda micro: images[micro.position - self._first :][: len(micro)],
            masks=MaskSampler(config.masks, config.model.grid, seed=config.seed),
            schedule=self.schedule,
            objective=build_objective(config.objective, triton=config.engine.triton),
            batch_size=config.data.batch_size,
            meters=self.meters,
        )

    def take(self, step: int) -> StepInfo:
        """Runs a step and returns its loss and gradient norm, scalars on the device."""
        return self._step(batch_of(step, len(self._images), first=self._first))

    def __call__(self, step: int) -> Tensor:
        """Runs a step and returns its loss, a scalar on the device."""
        return self.take(step).loss


class Baseline:
    """The baseline's training step, on the masks of `draws`."""

    def __init__(self, config: PretrainConfig, module: JEPA, images: Tensor, draws: Draws, **options: Any) -> None:
        self.schedule = build_schedule(config, STEPS_PER_EPOCH)
        self.images, self._draws = images, draws
        bf16 = config.engine.precision == "bf16"
        self.step = BaselineStep(config.model, config.seed, device=images.device, bf16=bf16, module=module, **options)

    def __call__(self, step: int) -> Tensor:
        """Runs a step and returns its loss; the baseline reads it on the host."""
        hyper, masks = self.schedule(step), self._draws(step)
        assert isinstance(masks, DenseMasks)
        return torch.tensor(self.step(self.images, masks, hyper.lr, hyper.weight_decay, hyper.momentum))


def start(config: PretrainConfig) -> JEPA:
    """Returns the module whose weights all sides of a comparison start with, on the CPU."""
    return build_jepa(config.model, config.seed)

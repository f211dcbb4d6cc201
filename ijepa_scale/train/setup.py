"""Turns a configuration into the parts of a pretraining run, and refuses what can't be run."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, TypeVar

import torch

from ijepa_scale.augment import Augment
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.open import training_order, training_source
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.engine.attention import require_packed
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.planning.hardware import peak_flops
from ijepa_scale.planning.strategy import resolve_engine
from ijepa_scale.schedules import Schedule
from ijepa_scale.train.step import TrainStep

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

logger = logging.getLogger(__name__)

# A checkpoint continues a run only where these sections are the same; the others may change, and are named.
IDENTITY = ("seed", "model", "masks", "augment", "objective")


@dataclasses.dataclass(kw_only=True)
class Run:
    """The parts of one process's pretraining run."""

    config: PretrainConfig
    world: World
    engine: Engine
    step: TrainStep
    meters: Meters
    masks: MaskSampler
    augment: Augment
    source: SampleSource | StreamSource
    order: SampleOrder | StreamOrder
    schedule: Schedule
    batch_size: int  # of all processes

    @property
    def last_step(self) -> int:
        """The number of steps after which the run stops."""
        stop = self.config.schedule.stop_after
        return self.schedule.total_steps if stop is None else min(stop, self.schedule.total_steps)

    def loader(self, first_step: int) -> TrainLoader:
        """Returns this process's batches from `first_step` on."""
        data = self.config.data
        return TrainLoader(
            self.source,
            self.order,
            self.config.augment,
            self.config.model.image_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            workers=data.workers,
            prefetch=data.prefetch,
            start_step=first_step,
            stop_step=self.last_step,
            max_bad_fraction=data.max_bad_fraction,
            device=self.world.device,
        )

    def peak_flops(self) -> float | None:
        """Returns the peak of all devices together, FLOP/s, or None where it isn't known."""
        return device_peak_flops(self.world)

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must agree in to be continued by this run."""
        config = dataclasses.asdict(self.config)
        return {
            **{section: plain_values(config[section]) for section in IDENTITY},
            "batch size of all processes": self.batch_size,
            "data": self.source.fingerprint,
            "data.window_shards": self.config.data.window_shards,
        }


def device_peak_flops(world: World) -> float | None:
    """Returns the peak of all devices together, FLOP/s, or None where it isn't known."""
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    return None if peak is None else peak * world.size


def plain_values(value: Any) -> Any:
    """Returns `value` as JSON would give it back: tuples as lists."""
    if isinstance(value, dict):
        return {key: plain_values(inner) for key, inner in value.items()}
    return [plain_values(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def with_strategy(config: Config, launch: Launch, device: torch.device) -> Config:
    """Returns the configuration with `engine.strategy: auto` replaced, and logs the choice with its reason.

    A classifier counts as its encoder pretrained, with target and predictor: an upper bound.
    """
    model = config.model if isinstance(config, PretrainConfig) else config.model.encoder
    optimizer = config.optimizer if isinstance(config, PretrainConfig) else config.optimizer.adamw(1)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    engine, reason = resolve_engine(
        config.engine,
        model,
        world=launch.world_size,
        processes_per_node=launch.local_world_size,
        device=device.type,
        device_memory_bytes=memory,
        optimizer_states=optimizer.state_names,
    )
    logger.info("engine.strategy is %s: %s", engine.strategy, reason)
    return dataclasses.replace(config, engine=engine)


def global_batch(config: PretrainConfig | FinetuneConfig, processes: int) -> int:
    """Returns the images of one optimiser step over all processes.

    Raises:
        ConfigError: they can't be shared out evenly.
    """
    data, accumulation = config.data, config.engine.accumulation
    batch = data.batch_size or (data.batch_size_per_process or 0) * processes
    unit = processes * accumulation
    if batch % unit:
        near = max(unit, batch // unit * unit)
        raise ConfigError(
            f"batch {batch} is not divisible by {processes} processes x accumulation {accumulation}; try {near}"
        )
    return batch


def build_schedule(config: PretrainConfig, steps_per_epoch: int) -> Schedule:
    """Returns the schedules of the run; `schedule.steps_per_epoch` goes before the data's own."""
    return Schedule(
        steps_per_epoch=config.schedule.steps_per_epoch or steps_per_epoch,
        epochs=config.schedule.epochs,
        warmup_epochs=config.schedule.warmup_epochs,
        ipe_scale=config.schedule.ipe_scale,
        start_lr=config.optimizer.start_lr,
        lr=config.optimizer.lr,
        final_lr=config.optimizer.final_lr,
        weight_decay=config.optimizer.weight_decay,
        final_weight_decay=config.optimizer.final_weight_decay,
        momentum=config.schedule.momentum,
    )


def build_run(config: PretrainConfig, world: World) -> Run:
    """Returns the parts of a run, with the engine prepared. Communicates where the engine does."""
    batch_size = global_batch(config, world.size)
    masks = MaskSampler(config.masks, config.model.grid, seed=config.seed)  # first: it refuses what can't be drawn
    data = config.data
    height, width = (max(256, side) for side in config.model.image_size)  # of synthetic images
    source = training_source(data, (height, width))
    if not isinstance(source, StreamSource):
        check_problems(source.problems(), source.num_samples, data.max_bad_fraction, log=world.is_main)
    order = training_order(data, source, batch_size, seed=config.seed, steps_per_epoch=config.schedule.steps_per_epoch)
    schedule = build_schedule(config, order.steps_per_epoch)
    augment = Augment(config.augment, config.model.image_size, seed=config.seed, device=world.device)
    module = build_jepa(config.model, config.seed)
    target = build_target(module)
    engine = build_engine(world, config.engine, config.optimizer)
    engine.prepare(module, target)
    if config.masks.context == "packed":
        require_packed(config.engine, module, world)
    meters = Meters(world.device)
    step = TrainStep(
        engine,
        augment=augment,
        masks=masks,
        schedule=schedule,
        objective=config.objective,
        batch_size=batch_size,
        meters=meters,
    )
    return Run(
        config=config,
        world=world,
        engine=engine,
        step=step,
        meters=meters,
        masks=masks,
        augment=augment,
        source=source,
        order=order,
        schedule=schedule,
        batch_size=batch_size,
    )

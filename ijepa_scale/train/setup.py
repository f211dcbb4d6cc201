"""Turns a configuration into what both kinds of training need, and refuses what can't be run."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import EncoderConfig
from ijepa_scale.data.sources.open import training_source
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.strategy import resolve_engine

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

logger = logging.getLogger(__name__)

_SYNTHETIC_SIDE = 256  # pixels, at least, of synthetic images


def with_strategy(config: Config, launch: Launch, device: torch.device) -> Config:
    """Returns the configuration with `engine.strategy: auto` replaced, and logs the choice with its reason.

    A classifier counts as its encoder pretrained, with target and predictor: an upper bound.
    """
    model = config.model if isinstance(config, PretrainConfig) else config.model.pretrained
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
    return config.replace(engine=engine)


def encoder_of(config: PretrainConfig | FinetuneConfig) -> EncoderConfig:
    """Returns the section of the encoder: pretraining's model section holds it, finetuning's nests it."""
    return config.model if isinstance(config, PretrainConfig) else config.model.encoder


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


def open_training_source(config: PretrainConfig | FinetuneConfig, *, log: bool) -> SampleSource | StreamSource:
    """Returns what the training images come from, and logs what its listing left out.

    Raises:
        DataError: data that can't be read, or of which more than `data.max_bad_fraction` can't be used.
    """
    height, width = (max(_SYNTHETIC_SIDE, side) for side in encoder_of(config).image_size)
    source = training_source(config.data, (height, width))
    if not isinstance(source, StreamSource):
        check_problems(source.problems(), source.num_samples, config.data.max_bad_fraction, log=log)
    return source

"""Setup that both kinds of training share: strategy, batch size and data source. Must not know either kind's step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import torch

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig, FinetuneConfig
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.config.schema import EncoderConfig
from ijepa_scale.data.first_images import check_first
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.labels import class_warnings
from ijepa_scale.data.sources.listing import root_of
from ijepa_scale.data.sources.open import training_source
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.statistics import normalisation_of, statistics_path
from ijepa_scale.engine.parallelize import choose_compile
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.host_memory import host_bytes
from ijepa_scale.planning.strategy import resolve_engine
from ijepa_scale.plurals import counted
from ijepa_scale.shipped import find

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

logger = logging.getLogger(__name__)

_SYNTHETIC_SIDE = 256  # smallest side of synthetic images, pixels


def with_strategy(config: Config, launch: Launch, device: torch.device) -> Config:
    """Returns the configuration with `auto` resolved in `engine.strategy` and `engine.compile`, and logs each reason.

    For a classifier it assumes the memory of pretraining its encoder, an upper bound.
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
    if engine.ds_config is not None and (found := find(engine.ds_config)) != Path(engine.ds_config):
        logger.info("%s is the package's, %s", engine.ds_config, found)
    return config.replace(engine=choose_compile(engine, device))


def encoder_of(config: PretrainConfig | FinetuneConfig) -> EncoderConfig:
    """Returns the section of the encoder: the model section in pretraining, a part of it in finetuning."""
    return config.model if isinstance(config, PretrainConfig) else config.model.encoder


def pixels_of(config: PretrainConfig | FinetuneConfig) -> PixelFormat:
    """Returns the format of the images that a run reads."""
    return PixelFormat(encoder_of(config).channels, config.data.pixels)


def normalised(config: Config, source: SampleSource | StreamSource) -> Config:
    """Returns the configuration with the measured normalisation, if it is left open, and logs where it is from.

    Raises:
        DataError: nothing was measured of these images; or the first images all have another format.
    """
    data, pixels = config.data, pixels_of(config)
    is_remote = data.train is not None and scheme_of(data.train) is not None
    if not isinstance(source, StreamSource) and not (pixels.is_rgb8 and is_remote):
        check_first(source, pixels, data.exif, "model" if isinstance(config, PretrainConfig) else "model.encoder")
    if config.augment.mean is not None:
        return config
    if isinstance(source, SyntheticSource):
        mean, std = source.statistics()
    else:
        mean, std = normalisation_of(data, pixels=pixels, fingerprint=source.fingerprint)
        logger.info("augment.mean and augment.std are those measured: %s", statistics_path(data.train))
    return config.replace(augment=config.augment.replace(mean=mean, std=std))


def global_batch(config: PretrainConfig | FinetuneConfig, processes: int) -> int:
    """Returns the number of images per optimiser step over all processes.

    Raises:
        ConfigError: they can't be divided evenly over processes and micro-batches.
    """
    data, accumulation = config.data, config.engine.accumulation
    batch = data.batch_size or (data.batch_size_per_process or 0) * processes
    if batch % (processes * accumulation):
        unit = processes * accumulation * _together(config)
        raise ConfigError(
            f"batch {batch} is not divisible by {counted(processes, 'process')} x accumulation "
            f"{accumulation}; try data.batch_size={max(unit, batch // unit * unit)}"
        )
    return batch


def check_size(
    config: PretrainConfig | FinetuneConfig, source: SampleSource | StreamSource, batch: int, processes: int
) -> None:
    """Checks that the set has the images of one optimiser step of all processes.

    Raises:
        DataError: it is smaller; names settings with which a run can start.
    """
    if isinstance(source, StreamSource) or source.num_samples >= batch:
        return
    remedy = _fitting(config, source.num_samples, processes)
    if remedy is None:
        remedy = f"start 1 process with {_fitting(config, source.num_samples, 1)}"
    else:
        remedy = f"set {remedy}"
    raise DataError(
        f"the set has {counted(source.num_samples, 'image')}, fewer than one batch of {batch}; {remedy}, or give more "
        "images"
    )


def _fitting(config: PretrainConfig | FinetuneConfig, images: int, processes: int) -> str | None:
    """Returns settings for steps of at most so many images; None if there are fewer images than processes."""
    accumulation, together = config.engine.accumulation, _together(config)
    for unit, changes in (
        (accumulation * together, ""),
        (together, " engine.accumulation=1"),
        (1, " engine.accumulation=1" * (accumulation > 1) + " augment.mixup=0 augment.cutmix=0"),
    ):
        most = images // (processes * unit)
        if most:  # a power of two, which most runs can divide
            return f"data.batch_size={processes * unit * (1 << (most.bit_length() - 1))}{changes}"
    return None


def _together(config: PretrainConfig | FinetuneConfig) -> int:
    """Returns the number of images of a micro-batch that belong together: 2 where they are mixed in pairs."""
    augment = config.augment
    return 2 if isinstance(augment, FinetuneAugmentConfig) and (augment.mixup or augment.cutmix) else 1


def check_host_memory(loader: TrainLoader, world: World) -> None:
    """Checks that all processes of each host can page-lock their loader's buffers. Communicates one number.

    Page-locked memory can't be swapped: beyond the limit of the control group the kernel kills the run.

    Raises:
        ConfigError: on some host they can't; raised on every process.
    """
    if world.device.type != "cuda":
        return
    needed = world.local_size * loader.buffer_bytes
    figures = torch.tensor([host_bytes(), needed], device=world.device)
    every = world.gather(figures).tolist()  # host sync: once per run, before any process locks its own
    room, needed = min(every, key=lambda pair: pair[0] - pair[1])  # hosts may run different numbers of processes
    if room < needed:
        raise ConfigError(
            f"the loaders of a host's processes page-lock {needed / 1e9:.2f} GB for batches but the host has "
            f"{room / 1e9:.2f} GB left (within its control group's limit); lower data.prefetch or data.workers, "
            "or give the job more memory"
        )


def open_training_source(config: PretrainConfig | FinetuneConfig, *, log: bool) -> SampleSource | StreamSource:
    """Returns the source of the training images, and logs images that can't be used.

    Raises:
        DataError: the data can't be read, or more than `data.max_bad_fraction` of it can't be used.
    """
    if config.data.reader == "imagefolder" and config.data.train is not None:
        root = root_of(config.data.train).resolve()
        if Path(config.folder).resolve().is_relative_to(root):
            raise ConfigError(
                f"folder {config.folder} is inside data.train {config.data.train}, so the run's pictures would join "
                "its images; set another folder"
            )
    height, width = (max(_SYNTHETIC_SIDE, side) for side in encoder_of(config).image_size)
    source = training_source(config.data, (height, width), encoder_of(config).channels)
    counted = source.num_counted if isinstance(source, StreamSource) else source.num_samples
    check_problems(source.problems(), counted, config.data.max_bad_fraction, log=log)
    if not isinstance(source, StreamSource):
        for line in class_warnings(source.classes, "data.train") if log and source.classes else ():
            logger.warning("%s", line)
    return source

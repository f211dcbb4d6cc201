"""Finds what the recipe `own_images` chooses by: the images and the machine. The rules are in `planning.own_images`."""

from __future__ import annotations

import contextlib
import logging
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ijepa_scale.checkpoint import store
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.form import PixelType
from ijepa_scale.config.pixels import MAX_CHANNELS, RGB8, PixelFormat
from ijepa_scale.config.yaml_text import flat, nest, parse_yaml, plain
from ijepa_scale.data.decode import decode
from ijepa_scale.data.deep_decode import decode_as, stored_format
from ijepa_scale.data.eval_reader import spread
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.open import reader_of, training_source
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.stored_values import is_stored
from ijepa_scale.environment import Launch, expand_path
from ijepa_scale.errors import ConfigError, DataError, SampleError
from ijepa_scale.planning.own_images import Facts, choose

logger = logging.getLogger(__name__)

# of what a run's config.yaml holds, what belongs to one start of it, like how it was spread over processes
_OF_A_START = ("folder", "resume", "recipe", "chosen_by_recipe", "schedule.stop_after")
_LOOKED_AT = 64  # images whose size is read


def choose_settings(given: Mapping[str, Any], launch: Launch, device: str) -> dict[str, Any]:
    """Returns the settings that the recipe chooses, nested, with their reasons in `chosen_by_recipe`.

    `given` holds the settings of files and overrides, nested; `device` is cpu, cuda or cuda:N. A run that has a
    checkpoint keeps what was chosen for it, whatever the images and the machine are now.

    Raises:
        ConfigError: no images are named, or what is given can't be used.
        DataError: the images can't be read.
    """
    folder = given.get("folder") or PretrainConfig.model_fields["folder"].default
    kept = _kept(Path(expand_path(str(folder))), set(flat(given)))
    if kept is not None:
        return kept
    choices = choose(_facts(given, launch, device), given)
    lines = [f"{choice.key}={_text(choice.value)}: {choice.reason}" for choice in choices]
    return nest({choice.key: choice.value for choice in choices}) | {"chosen_by_recipe": lines}


def _kept(folder: Path, given: set[str]) -> dict[str, Any] | None:
    """Returns what the run in `folder` was begun with and isn't given now; None if there is no run to be continued."""
    if store.newest(folder / "checkpoints") is None:
        return None
    path = folder / "config.yaml"
    try:
        stored = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        values = flat(stored)
        lines = [line for line in stored["chosen_by_recipe"] if line.partition("=")[0] not in given]
        chosen = {line.partition("=")[0] for line in lines}
        found = {
            key: plain(value)
            for key, value in values.items()
            if key in chosen or not (key in given or key in _OF_A_START or key.startswith("engine."))
        }
    except (OSError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f"recipe is own_images but {folder} holds a run for which it chose nothing ({path}); continue that run "
            "with its own configuration, or set another folder"
        ) from None
    return nest(found) | {"chosen_by_recipe": lines}


def _facts(given: Mapping[str, Any], launch: Launch, device: str) -> Facts:
    data = {**given["data"]} if isinstance(given.get("data"), Mapping) else {}
    if data.get("train") is None:
        raise ConfigError("data.train is null; name your images, e.g. data.train=/data/photos")
    if data.get("batch_size_per_process") is None:
        data.setdefault("batch_size", 1)
    named = expand_path(str(data["train"]))
    data["reader"] = data.get("reader") or reader_of(named)
    section = DataConfig.chosen(data).model_validate(data)
    assert isinstance(section, DataConfig)
    source = training_source(section, (256, 256))
    if isinstance(source, StreamSource):
        raise ConfigError(
            "recipe is own_images but data.reader is stream, which doesn't state the number of images; "
            "set data.reader=shards"
        )
    samples = _samples(source, section)
    found = _format(samples, section)
    model = {**given["model"]} if isinstance(given.get("model"), Mapping) else {}
    if model.get("init") is not None:
        raise ConfigError(
            f"recipe is own_images but model.init is {model['init']}, whose sizes would be the run's; start from it "
            "with configs/continue.yaml"
        )
    channels = plain(model["channels"]) if model.get("channels") is not None else found.channels
    pixels = PixelFormat(channels, section.pixels if data.get("pixels") is not None else found.dtype)
    facts: dict[str, Any] = {"device": "cpu", "device_name": "CPU"}
    if device.startswith("cuda"):
        # a task that a scheduler bound to one GPU sees only that
        index = int(device.partition(":")[2] or min(launch.local_rank, torch.cuda.device_count() - 1))
        properties = torch.cuda.get_device_properties(index)
        facts = {"device": "cuda", "device_name": properties.name, "memory_bytes": float(properties.total_memory)}
    return Facts(
        images=source.num_samples,
        shorter_side=_shorter_side(samples, pixels, section),
        pixels=pixels,
        reader=data["reader"],
        processes=launch.world_size,
        processes_per_host=launch.local_world_size,
        cores=len(os.sched_getaffinity(0)),
        has_bf16=facts["device"] == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        **facts,
    )


def _samples(source: SampleSource, data: DataConfig) -> list[bytes | np.ndarray]:
    """Returns a few images: the first of a remote set, else spread over it. Bad ones are left to training.

    Raises:
        DataError: none can be read.
    """
    ids = np.arange(min(_LOOKED_AT, source.num_samples))
    if scheme_of(str(data.train)) is None:
        ids = spread(source.num_samples, _LOOKED_AT)
    found = []
    for sample in ids.tolist():
        with contextlib.suppress(SampleError):
            content = source.read(sample)
            _format_of(content, data)
            found.append(content)
    if not found:
        raise DataError(
            f"none of {len(ids)} images of {data.train} that were tried can be read, such as "
            f"{source.name(int(ids[0]))}; docs/data.md lists what is read"
        )
    return found


def _format_of(sample: bytes | np.ndarray, data: DataConfig) -> PixelFormat:
    """Returns the format that keeps all of an image's values: 8-bit RGB for what is meant to be seen as it.

    A second or fourth channel of 8 bits is transparency in the formats that Pillow reads, but a band in TIFF, NPY and
    DICOM, which don't tell.

    Raises:
        SampleError: it can't be read.
    """
    try:
        channels, dtype = stored_format(sample)
    except SampleError:
        decode(sample, data.exif)  # a palette, CMYK and the like
        return RGB8
    bands = isinstance(sample, bytes) and is_stored(sample)
    seen = dtype == RGB8.dtype and channels in ((1, 3) if bands else (1, 2, 3, 4))
    if seen or channels > MAX_CHANNELS or dtype not in typing.get_args(PixelType):
        return RGB8
    return PixelFormat(channels, cast(PixelType, dtype))


def _format(samples: list[bytes | np.ndarray], data: DataConfig) -> PixelFormat:
    """Returns the format that all samples have; 8-bit RGB if they differ."""
    formats = {_format_of(sample, data) for sample in samples}
    return formats.pop() if len(formats) == 1 else RGB8


def _shorter_side(samples: list[bytes | np.ndarray], pixels: PixelFormat, data: DataConfig) -> int:
    """Returns the median of the samples' shorter sides, pixels."""
    sides = []
    for sample in samples:
        with contextlib.suppress(SampleError):  # counted where it is read for training
            sides.append(min(decode_as(pixels, sample, data.exif).shape[:2]))
    if not sides:
        raise DataError(
            f"none of {len(samples)} images of {data.train} that were tried has {pixels}; set model.channels and "
            "data.pixels to what they have"
        )
    return int(np.median(sides))


def _text(value: Any) -> str:
    return str(value).replace(" ", "")

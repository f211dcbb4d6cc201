"""Finds what the recipe `own_images` chooses by: the images and the machine. The rules are in `planning.own_images`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale.checkpoint import store
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.yaml_text import flat, nest, parse_yaml, plain
from ijepa_scale.data.decode import decode
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.open import training_source
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.environment import Launch, expand_path
from ijepa_scale.errors import ConfigError, DataError, SampleError
from ijepa_scale.planning.own_images import Facts, choose

logger = logging.getLogger(__name__)

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
    """Returns what was chosen for the run in `folder` and isn't given; None if there is no run to be continued."""
    if store.newest(folder / "checkpoints") is None:
        return None
    path = folder / "config.yaml"
    try:
        stored = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        values = flat(stored)
        lines = [line for line in stored["chosen_by_recipe"] if line.partition("=")[0] not in given]
        found = {key: plain(values[key]) for key in (line.partition("=")[0] for line in lines)}
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
    section = DataConfig.chosen(data).model_validate(data)
    assert isinstance(section, DataConfig)
    source = training_source(section, (256, 256))
    if isinstance(source, StreamSource):
        raise ConfigError(
            "recipe is own_images but data.reader is stream, which doesn't tell the number of images; "
            "set data.reader=shards"
        )
    facts: dict[str, Any] = {"device": "cpu", "device_name": "CPU"}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(int(device.partition(":")[2] or launch.local_rank))
        facts = {"device": "cuda", "device_name": properties.name, "memory_bytes": float(properties.total_memory)}
    return Facts(
        images=source.num_samples,
        shorter_side=_shorter_side(source, section),
        processes=launch.world_size,
        processes_per_host=launch.local_world_size,
        cores=len(os.sched_getaffinity(0)),
        has_bf16=facts["device"] == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        **facts,
    )


def _shorter_side(source: SampleSource, data: DataConfig) -> int:
    """Returns the median of the shorter sides, in pixels, of a few images: the first of a remote set, else any."""
    ids = np.arange(min(_LOOKED_AT, source.num_samples))
    if scheme_of(str(data.train)) is None:
        ids = np.unique(np.linspace(0, source.num_samples - 1, len(ids)).astype(np.int64))
    sides = []
    for sample in ids.tolist():
        with contextlib.suppress(SampleError):  # counted where it is read for training
            sides.append(min(decode(source.read(sample), data.exif).shape[:2]))
    if not sides:
        raise DataError(
            f"none of {len(ids)} images of {data.train} that were tried can be read, such as "
            f"{source.name(int(ids[0]))}; docs/data.md lists what is read"
        )
    return int(np.median(sides))


def _text(value: Any) -> str:
    return str(value).replace(" ", "")

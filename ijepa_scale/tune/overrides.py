"""Writes the winner as a YAML file on top of the tuned configuration, and as settings to paste."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from ijepa_scale.config import PretrainConfig, load_config, read_config
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.yaml_text import nest, write_yaml
from ijepa_scale.environment import written_path
from ijepa_scale.errors import ConfigError
from ijepa_scale.new_file import new_file
from ijepa_scale.shipped import find

# written even if the configuration has the same values, so that a later change of it doesn't undo the tuning
TUNED = ("engine.strategy", "engine.accumulation", "engine.checkpointing", "engine.compile", "engine.attention")


def overrides_of(path: Path, tuned: PretrainConfig, *, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the dotted settings that turn the file into `tuned`: those tuned, and those of the command line."""
    after = _flat(tuned)
    try:
        before = _flat(read_config(path).config)
    except ConfigError:  # it isn't valid without the settings of the command line
        before = {}
    always = {*TUNED, *also}
    return {key: after[key] for key in after if key in always or before.get(key) != after[key]}


def write_overrides(path: Path, base: Path, settings: Mapping[str, Any], tuned: PretrainConfig, notes: str) -> None:
    """Writes a configuration file that is `base` with these settings, with `notes` as comments at the top.

    A base that is found in the package keeps its name, if it is found there again by it; others are named by their
    path from the new file.

    Raises:
        ConfigError: the file can't be written.
    """
    found = find(base)
    is_shipped = found != base and find(base, path.resolve().parent) == found
    named = str(base) if is_shipped else os.path.relpath(found.resolve(), path.resolve().parent)
    nested = {"base": written_path(named), **nest(settings)}
    comments = "".join(f"# {line}\n" for line in notes.splitlines())
    try:
        with new_file(path) as temporary:
            temporary.write_text(comments + write_yaml(nested))
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error}); give another file with --to") from error
    assert load_config(path) == tuned, f"{path} doesn't load as the tuned configuration"


def as_arguments(settings: Mapping[str, Any]) -> str:
    """Returns the settings as arguments for a command line."""
    return " ".join(f"{key}={_plain(value)}" for key, value in settings.items())


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return shlex.quote(value)
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _flat(config: PretrainConfig) -> dict[str, Any]:
    """Returns the dotted settings of a configuration."""
    return {key: reduce(lambda inner, part: inner[part], key.split("."), config.values()) for key in known_keys(config)}

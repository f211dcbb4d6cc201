"""Configuration files that the tests write, and what is said of wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.config import PretrainConfig, load_config, read_config
from ijepa_scale.config.section import Section
from ijepa_scale.config.yaml_text import nest
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.own_images import Facts, choose


def write(folder: Path, name: str, text: str) -> Path:
    """Returns a new file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """Returns the lines of the error that a file with these overrides raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def load_shipped(path: Path, overrides: Sequence[str] = (), *, kind: type[Section] = PretrainConfig) -> Any:
    """Returns the configuration of a file that we ship; a recipe chooses for a laptop."""
    laptop = Facts(images=500, shorter_side=400, processes=1, processes_per_host=1, cores=4, device="cpu")

    def chosen(given: Mapping[str, Any]) -> dict[str, Any]:
        return nest({choice.key: choice.value for choice in choose(laptop, given)})

    return read_config(path, overrides, kind=kind, choose=chosen).config

"""Tells of files that the demonstration makes and a configuration needs. Must not know what is in them."""

from __future__ import annotations

import os
from pathlib import Path

from ijepa_scale.config.section import Section
from ijepa_scale.config.yaml_text import flat
from ijepa_scale.errors import ConfigError

_MADE = ("datasets/fashion-mnist", "runs/demo")  # by launch/demo.py, where it runs
_OWN = ("folder",)  # what a run makes itself


def check_made(config: Section) -> None:
    """Checks that what the demonstration makes is there if the configuration names it.

    Raises:
        ConfigError: it isn't; names the command that makes it.
    """
    values = flat(config.values())
    unread = [*_OWN]
    if values["data.reader"] == "synthetic":
        unread.append("data.train")
    if values.get("evaluate.every") == 0:
        unread += [key for key in values if key.startswith("evaluate.")]
    for key, value in values.items():
        if key in unread or not isinstance(value, str) or os.path.lexists(value):
            continue
        if any(Path(value).is_relative_to(made) for made in _MADE):
            raise ConfigError(
                f"{key} is {value}, which the demonstration makes and isn't in {Path.cwd()}; run `make demo` there "
                "first (python launch/demo.py), or name your own"
            )

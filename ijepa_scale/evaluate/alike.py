"""Compares what the processes of an evaluation were given before they share work. Knows no protocol.

Paths may differ between hosts. What they lead to may not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ijepa_scale.checkpoint.digests import digest_of_tensors
from ijepa_scale.engine.agreement import check_alike
from ijepa_scale.engine.world import World

_OF_A_PROCESS = {"workers", "progress", "overwrite"}  # no figure depends on these


def check_options(world: World, options: Any, *, paths: set[str], flags: Mapping[str, str]) -> None:
    """Checks that all processes have the same options. Communicates.

    Args:
        world: the processes.
        options: a dataclass of what the command line asks for.
        paths: the fields that are paths, which aren't compared.
        flags: the flags of fields that aren't called as they are.

    Raises:
        ConfigError: they don't; raised on every process.
    """
    names = [each.name for each in dataclasses.fields(options) if each.name not in _OF_A_PROCESS | paths]
    flag = {name: flags.get(name, f"--{name.replace('_', '-')}") for name in names}
    check_alike(world, {flag[name]: repr(getattr(options, name)) for name in names})


def check_opened(world: World, encoder: nn.Module, images: Mapping[str, str]) -> None:
    """Checks that all processes have the same weights, on the CPU, and sets of images, described by name. Communicates.

    Raises:
        ConfigError: they don't; raised on every process.
    """
    weights = digest_of_tensors(encoder.state_dict())[:12] if world.size > 1 else ""
    check_alike(world, {"the encoder": weights, **{f"what is in {name}": said for name, said in images.items()}})


__all__ = ["check_opened", "check_options"]

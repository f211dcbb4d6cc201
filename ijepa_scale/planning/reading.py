"""Reads the configuration to plan for."""

from __future__ import annotations

from collections.abc import Sequence

from ijepa_scale.config.files import read_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.errors import ConfigError


def read_planned(path: str, overrides: Sequence[str] = ()) -> PretrainConfig | FinetuneConfig:
    """Returns the configuration in a file, of pretraining or else of finetuning, after applying overrides.

    Raises:
        ConfigError: it is valid as neither; see `read_config`.
    """
    try:
        return read_config(path, overrides, needs_paths=False).config
    except ConfigError:
        if _reads_as(path, FinetuneConfig) and not _reads_as(path, PretrainConfig):
            return read_config(path, overrides, kind=FinetuneConfig, needs_paths=False).config
        raise


def _reads_as(path: str, kind: type) -> bool:
    try:
        read_config(path, kind=kind, needs_paths=False)
    except ConfigError:
        return False
    return True

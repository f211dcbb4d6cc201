"""Reads the configuration to plan for."""

from __future__ import annotations

from collections.abc import Sequence

from ijepa_scale.config.files import read_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.errors import ConfigError


def read_pretraining(path: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Returns the pretraining configuration in a file, after applying overrides.

    Raises:
        ConfigError: the file is a finetuning configuration, or is invalid; see `read_config`.
    """
    try:
        return read_config(path, overrides, needs_paths=False).config
    except ConfigError:
        if _reads_as(path, FinetuneConfig) and not _reads_as(path, PretrainConfig):
            raise ConfigError(
                f"{path} is a finetuning configuration; plan.py takes pretraining ones, such as configs/base.yaml"
            ) from None
        raise


def _reads_as(path: str, kind: type) -> bool:
    try:
        read_config(path, kind=kind)
    except ConfigError:
        return False
    return True

"""The configuration of a run: schema, YAML files, translation of published files."""

from ijepa_scale.config.files import Loaded, load_config, read_config, to_yaml
from ijepa_scale.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    LoggingConfig,
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
)

__all__ = [
    "Loaded",
    "load_config",
    "read_config",
    "to_yaml",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "LoggingConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "ScheduleConfig",
]

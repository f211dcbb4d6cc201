"""The configuration of a run: schema, YAML files, translation of published files. Floor 1."""

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

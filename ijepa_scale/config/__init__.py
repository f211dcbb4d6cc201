"""The configuration of a run: schema, YAML files, translation of published files."""

from ijepa_scale.config.data import AugmentConfig, DataConfig
from ijepa_scale.config.files import Loaded, load_config, read_config, to_yaml
from ijepa_scale.config.schema import (
    AdamWConfig,
    BlockMaskConfig,
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    EvaluateConfig,
    KnnConfig,
    LoggingConfig,
    MaskConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    RegressionConfig,
    ScheduleConfig,
)

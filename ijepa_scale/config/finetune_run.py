"""A finetuning run: its sections put together. Knows no component."""

from __future__ import annotations

from dataclasses import dataclass, field

from ijepa_scale.config.checks import at_least, choose, raise_problems
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.finetune import ClassifierConfig, FinetuneOptimizerConfig
from ijepa_scale.config.finetune_augment import FinetuneAugmentConfig
from ijepa_scale.config.schema import CheckpointConfig, EngineConfig, LoggingConfig
from ijepa_scale.errors import ConfigError

_SMALL_IMAGE, _WHOLE_IMAGE = 64, 224  # pixels


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluationConfig:
    """Accuracy on held-out images, over all processes, each image once."""

    data: str | None = None  # tar pattern or folder of class folders; null: no evaluation
    reader: str = "shards"  # shards | imagefolder
    every_epochs: float = 1.0  # epochs between evaluations; one is always made at the end
    batch_size: int = 64  # images per process and forward pass
    crop_fraction: float | None = None  # centre crop / resized side; null: 0.875, and 1 above 224 and up to 64 pixels
    workers: int = 2  # decoding processes per training process

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "reader", self.reader, ("shards", "imagefolder"))
        at_least(problems, 1, batch_size=self.batch_size)
        at_least(problems, 0, workers=self.workers)
        if not self.every_epochs > 0:
            problems.append(f"every_epochs is {self.every_epochs}; give a number above 0")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            problems.append(f"crop_fraction is {self.crop_fraction}; give a number above 0 and at most 1, or null")
        raise_problems("evaluate", problems)

    def crop_of(self, image_size: tuple[int, int]) -> float:
        """Returns the crop fraction for images of that size, pixels."""
        if self.crop_fraction is not None:
            return self.crop_fraction
        return 0.875 if _SMALL_IMAGE < max(image_size) <= _WHOLE_IMAGE else 1.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A finetuning run."""

    folder: str = "runs/finetune"  # logs, checkpoints, results and the resolved config
    seed: int = 0
    resume: str = "auto"  # auto (the newest checkpoint in the folder, if any) | none | a checkpoint folder
    stop_after: int | None = None  # stop at this step; the schedule stays that of the whole run
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(batch_size=1024))
    augment: FinetuneAugmentConfig = field(default_factory=FinetuneAugmentConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: ClassifierEvaluationConfig = field(default_factory=ClassifierEvaluationConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give a number of at least 0")
        if self.stop_after is not None and self.stop_after < 0:
            raise ConfigError(f"stop_after is {self.stop_after}; give a step of at least 0, or null")
        if self.engine.target_precision is not None:
            raise ConfigError(
                f"engine.target_precision is {self.engine.target_precision}; finetuning has no target: set it to null"
            )
        if self.data.reader == "stream":
            raise ConfigError(
                "data.reader is stream; finetuning counts epochs and labels: use data.reader=shards or imagefolder"
            )

"""Augmentation of finetuning. Knows no component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ijepa_scale.config.checks import at_least, choose, fraction, interval, numbers, raise_problems
from ijepa_scale.config.rand_augment_notation import parse
from ijepa_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FinetuneAugmentConfig:
    """The MAE recipe's augmentation, drawn per sample and run on the device. Source: arXiv 2111.06377, appendix A.1."""

    crop_scale: Any = (0.08, 1.0)  # share of the image's area
    crop_ratio: Any = (0.75, 1.3333333333333333)  # width / height
    interpolation: str = "bicubic"  # bilinear | bicubic, of the crop (antialiased) and of RandAugment, as in PIL
    flip: float = 0.5  # probability of a horizontal flip
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's notation; null: none
    color_jitter: float = 0.0  # brightness, contrast, saturation by 1 - s to 1 + s, beside RandAugment too; 0: off
    random_erasing: float = 0.25  # probability
    mixup: float = 0.8  # alpha of the Beta distribution; 0: none
    cutmix: float = 1.0  # alpha of the Beta distribution; 0: none
    mix_probability: float = 1.0  # that a pair is mixed at all
    switch_probability: float = 0.5  # of cutmix, where both are on
    label_smoothing: float = 0.1
    mean: Any = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
    std: Any = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "interpolation", self.interpolation, ("bilinear", "bicubic"))
        object.__setattr__(self, "crop_scale", interval(problems, "crop_scale", self.crop_scale, 1e-4, 1.0))
        object.__setattr__(self, "crop_ratio", interval(problems, "crop_ratio", self.crop_ratio, 1e-2, 1e2))
        fraction(problems, flip=self.flip, random_erasing=self.random_erasing, label_smoothing=self.label_smoothing)
        fraction(problems, mix_probability=self.mix_probability, switch_probability=self.switch_probability)
        at_least(problems, 0, mixup=self.mixup, cutmix=self.cutmix, color_jitter=self.color_jitter)
        if self.rand_augment is not None:
            try:
                parse(self.rand_augment)
            except ConfigError as error:
                problems.append(str(error).removeprefix("augment."))
        for name in ("mean", "std"):
            object.__setattr__(self, name, numbers(problems, name, getattr(self, name), 3))
        if min(self.std) <= 0:
            problems.append(f"std is {self.std}; give three numbers above 0")
        raise_problems("augment", problems)

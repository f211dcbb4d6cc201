"""Where images come from and how they are augmented. Knows no component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ijepa_scale.config.checks import at_least, choose, fraction, interval, numbers, raise_problems


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training images come from and how they are grouped."""

    reader: str = "shards"  # shards (WebDataset tars) | stream (plain webdataset) | imagefolder | synthetic
    train: str | None = None  # tar pattern (dir, glob, {000..127}, https:// s3:// gs:// hf://), or folder of classes
    batch_size: int | None = None  # images per optimiser step, over all processes
    batch_size_per_process: int | None = None  # instead of batch_size: images per process and optimiser step
    workers: int = 2  # decoding processes per training process; 0: in the training process
    prefetch: int = 2  # batches each worker prepares ahead
    window_shards: int = 8  # shards whose samples are shuffled together
    cache: str | None = None  # local folder of fetched remote shards, shared by the processes of a machine
    cache_gb: float = 100.0  # GiB that the cache may take
    stream_shuffle: int = 1000  # reader stream: encoded samples that each worker holds and draws from
    allow_pipe: bool = False  # reader stream: `pipe:` addresses, which run shell commands
    synthetic_samples: int = 1_281_167  # size of the synthetic set (IN1K's by default)
    max_bad_fraction: float = 0.001  # share of undecodable samples over which training stops

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "reader", self.reader, ("shards", "stream", "imagefolder", "synthetic"))
        if (self.batch_size is None) == (self.batch_size_per_process is None):
            problems.append(
                f"batch_size is {self.batch_size} and batch_size_per_process {self.batch_size_per_process}; "
                "give exactly one of them"
            )
        at_least(problems, 1, batch_size=self.batch_size, batch_size_per_process=self.batch_size_per_process)
        at_least(problems, 1, prefetch=self.prefetch, window_shards=self.window_shards)
        at_least(problems, 1, synthetic_samples=self.synthetic_samples, stream_shuffle=self.stream_shuffle)
        if not self.cache_gb > 0:
            problems.append(f"cache_gb is {self.cache_gb}; give a number above 0")
        at_least(problems, 0, workers=self.workers)
        fraction(problems, max_bad_fraction=self.max_bad_fraction)
        raise_problems("data", problems)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training augmentation, drawn per sample and run on the device. Probabilities are per image."""

    crop_scale: Any = (0.3, 1.0)  # share of the image's area
    crop_ratio: Any = (0.75, 1.3333333333333333)  # width / height
    interpolation: str = "bilinear"  # bilinear | bicubic, both antialiased as in PIL
    flip: float = 0.0  # probability of a horizontal flip
    color_jitter: float = 0.0  # strength s: brightness, contrast, saturation 0.8 s, hue 0.2 s; 0: off
    color_jitter_probability: float = 0.8
    grayscale: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur, sigma 0.1 to 2.0 pixels
    solarize: float = 0.0  # probability of inverting the levels from 128 on
    mean: Any = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
    std: Any = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "interpolation", self.interpolation, ("bilinear", "bicubic"))
        object.__setattr__(self, "crop_scale", interval(problems, "crop_scale", self.crop_scale, 1e-4, 1.0))
        object.__setattr__(self, "crop_ratio", interval(problems, "crop_ratio", self.crop_ratio, 1e-2, 1e2))
        fraction(problems, flip=self.flip, grayscale=self.grayscale, blur=self.blur, solarize=self.solarize)
        fraction(problems, color_jitter_probability=self.color_jitter_probability)
        at_least(problems, 0, color_jitter=self.color_jitter)
        if self.color_jitter > 1.25:
            problems.append(f"color_jitter is {self.color_jitter}; give at most 1.25 (factors would turn negative)")
        for name in ("mean", "std"):
            object.__setattr__(self, name, numbers(problems, name, getattr(self, name), 3))
        if min(self.std) <= 0:
            problems.append(f"std is {self.std}; give three numbers above 0")
        raise_problems("augment", problems)

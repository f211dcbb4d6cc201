"""What a run is made of: frozen dataclasses, one per component. Floor 1: knows no component.

Every field is checked when the dataclass is made, all problems of a section in one message; a
component is handed its own section, never the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ijepa_scale.errors import ConfigError


def _choose(problems: list[str], name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        problems.append(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _interval(problems: list[str], name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Returns `value` as an ascending pair within [low, high], noting what is wrong."""
    try:
        first, last = (float(v) for v in value)
    except (TypeError, ValueError):
        problems.append(f"{name} is {value!r}; give two numbers [from, to]")
        return low, high
    if not low <= first <= last <= high:
        problems.append(f"{name} is [{first:g}, {last:g}]; give {low:g} <= from <= to <= {high:g}")
    return first, last


def _numbers(problems: list[str], name: str, value: Any, count: int) -> tuple[float, ...]:
    """Returns `value` as `count` numbers (ones where it isn't that), noting what is wrong."""
    try:
        numbers = tuple(float(v) for v in value)
        if len(numbers) != count:
            raise ValueError
    except (TypeError, ValueError):
        problems.append(f"{name} is {value!r}; give {count} numbers")
        return (1.0,) * count
    return numbers


def _at_least(problems: list[str], low: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= low:
            problems.append(f"{name} is {value}; give at least {low:g}")


def _fraction(problems: list[str], **values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            problems.append(f"{name} is {value}; give a number from 0 to 1")


def _raise(section: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(f"{section}.{problem}" for problem in problems))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and predictor. A size left null is the named architecture's."""

    name: str = "vit_base"  # vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant
    image_size: Any = 224  # pixels: one number, or [height, width]
    patch_size: int = 16  # pixels
    width: int | None = None  # encoder token width
    depth: int | None = None  # encoder blocks
    heads: int | None = None  # attention heads, encoder and predictor alike
    mlp_ratio: float | None = None  # MLP width / token width
    predictor_width: int = 384
    predictor_depth: int | None = None
    rescale_residual: bool = False  # divide attn.proj and mlp.fc2 by sqrt(2 * layer): published intent, not parity

    def __post_init__(self) -> None:
        problems: list[str] = []
        size = self.image_size
        try:
            pair = (int(size), int(size)) if isinstance(size, (int, float, str)) else tuple(int(s) for s in size)
            if len(pair) != 2:
                raise ValueError
        except (TypeError, ValueError):
            raise ConfigError(f"model.image_size is {size!r}; give pixels, or [height, width]") from None
        object.__setattr__(self, "image_size", pair)
        _at_least(problems, 1, patch_size=self.patch_size, width=self.width, depth=self.depth, heads=self.heads)
        _at_least(problems, 1, predictor_width=self.predictor_width, predictor_depth=self.predictor_depth)
        if self.patch_size >= 1 and any(s < self.patch_size or s % self.patch_size for s in pair):
            near = tuple(max(1, round(s / self.patch_size)) * self.patch_size for s in pair)
            problems.append(f"image_size {pair} is no multiple of patch_size {self.patch_size}; try {near}")
        _raise("model", problems)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Context and target blocks. Scales are shares of the patch grid, aspects height / width."""

    sampler: str = "multiblock"  # multiblock | reference (the published draw, quirks included)
    context: str = "truncate"  # truncate: cut to the shortest of the group | packed: keep every token
    num_context_blocks: int = 1
    num_target_blocks: int = 4
    context_scale: Any = (0.85, 1.0)
    target_scale: Any = (0.15, 0.2)
    target_aspect: Any = (0.75, 1.5)
    min_keep: int = 10  # a block must keep more patches than this
    allow_overlap: bool = False  # true: context keeps the patches of the targets
    group_size: int = 128  # images that share one block size and one cut, whatever the processes

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "sampler", self.sampler, ("multiblock", "reference"))
        _choose(problems, "context", self.context, ("truncate", "packed"))
        for name in ("context_scale", "target_scale"):
            object.__setattr__(self, name, _interval(problems, name, getattr(self, name), 0.0, 1.0))
        object.__setattr__(self, "target_aspect", _interval(problems, "target_aspect", self.target_aspect, 1e-3, 1e3))
        _at_least(problems, 1, num_context_blocks=self.num_context_blocks, num_target_blocks=self.num_target_blocks)
        _at_least(problems, 1, group_size=self.group_size)
        _at_least(problems, 0, min_keep=self.min_keep)
        _raise("masks", problems)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training images come from and how they are grouped."""

    reader: str = "shards"  # shards (WebDataset tars) | imagefolder | synthetic
    train: str | None = None  # tar pattern (dir, glob, {000..127} braces), or the folder of class folders
    batch_size: int | None = None  # images per optimiser step, over all processes
    batch_size_per_process: int | None = None  # instead of batch_size: images per process and optimiser step
    workers: int = 2  # decoding processes per training process; 0: in the training process
    prefetch: int = 2  # batches each worker prepares ahead
    window_shards: int = 8  # shards whose samples are shuffled together
    synthetic_samples: int = 1_281_167  # size of the synthetic set (IN1K's by default)
    max_bad_fraction: float = 0.001  # share of undecodable samples over which training stops

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "reader", self.reader, ("shards", "imagefolder", "synthetic"))
        if (self.batch_size is None) == (self.batch_size_per_process is None):
            problems.append(
                f"batch_size is {self.batch_size} and batch_size_per_process {self.batch_size_per_process}; "
                "give exactly one of them"
            )
        _at_least(problems, 1, batch_size=self.batch_size, batch_size_per_process=self.batch_size_per_process)
        _at_least(problems, 1, prefetch=self.prefetch, window_shards=self.window_shards)
        _at_least(problems, 1, synthetic_samples=self.synthetic_samples)
        _at_least(problems, 0, workers=self.workers)
        _fraction(problems, max_bad_fraction=self.max_bad_fraction)
        _raise("data", problems)


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
    mean: Any = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
    std: Any = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "interpolation", self.interpolation, ("bilinear", "bicubic"))
        object.__setattr__(self, "crop_scale", _interval(problems, "crop_scale", self.crop_scale, 1e-4, 1.0))
        object.__setattr__(self, "crop_ratio", _interval(problems, "crop_ratio", self.crop_ratio, 1e-2, 1e2))
        _fraction(problems, flip=self.flip, grayscale=self.grayscale, blur=self.blur)
        _fraction(problems, color_jitter_probability=self.color_jitter_probability)
        _at_least(problems, 0, color_jitter=self.color_jitter)
        if self.color_jitter > 1.25:
            problems.append(f"color_jitter is {self.color_jitter}; give at most 1.25 (factors would turn negative)")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(problems, name, getattr(self, name), 3))
        if min(self.std) <= 0:
            problems.append(f"std is {self.std}; give three numbers above 0")
        _raise("augment", problems)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The distance between predicted and target features."""

    loss: str = "smooth_l1"  # smooth_l1 (the released code) | l2 (the paper's text)
    beta: float = 1.0  # where smooth L1 turns from quadratic to linear

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "loss", self.loss, ("smooth_l1", "l2"))
        if not self.beta > 0:
            problems.append(f"beta is {self.beta}; give a number above 0")
        _raise("objective", problems)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. Learning rates are absolute, per optimiser step; no batch-size scaling is applied."""

    impl: str = "auto"  # auto | torch | apex | deepspeed
    lr: float = 1e-3
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    betas: Any = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None  # global gradient norm; null: no clipping

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "impl", self.impl, ("auto", "torch", "apex", "deepspeed"))
        _at_least(problems, 0, lr=self.lr, start_lr=self.start_lr, final_lr=self.final_lr, eps=self.eps)
        _at_least(problems, 0, weight_decay=self.weight_decay, final_weight_decay=self.final_weight_decay)
        num_problems = len(problems)
        betas = _numbers(problems, "betas", self.betas, 2)
        object.__setattr__(self, "betas", betas)
        if len(problems) == num_problems and not all(0 <= b < 1 for b in betas):
            problems.append(f"betas is {betas}; give two numbers in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm is {self.clip_norm}; give a number above 0, or null for no clipping")
        _raise("optimizer", problems)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, and along which curves."""

    epochs: float = 300
    warmup_epochs: float = 40
    ipe_scale: float = 1.0  # stretches the curves beyond the run's end
    momentum: Any = (0.996, 1.0)  # EMA of the target encoder, from the first to the last step
    steps_per_epoch: int | None = None  # null: samples // batch
    stop_after: int | None = None  # stop at this step; the curves stay those of the whole run

    def __post_init__(self) -> None:
        problems: list[str] = []
        object.__setattr__(self, "momentum", _interval(problems, "momentum", self.momentum, 0.0, 1.0))
        _at_least(problems, 0, epochs=self.epochs, warmup_epochs=self.warmup_epochs, stop_after=self.stop_after)
        _at_least(problems, 1, steps_per_epoch=self.steps_per_epoch, ipe_scale=self.ipe_scale)
        if not self.epochs > 0:
            problems.append(f"epochs is {self.epochs}; give a number above 0")
        if self.warmup_epochs > self.epochs * self.ipe_scale:
            problems.append(f"warmup_epochs {self.warmup_epochs} is longer than the {self.epochs} epochs of the run")
        _raise("schedule", problems)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step is spread over processes and what it is computed in."""

    strategy: str = "auto"  # auto | plain | ddp | fsdp2 | deepspeed
    ds_config: str | None = None  # DeepSpeed JSON: stage, buckets and offload only
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "bf16"  # bf16 (autocast, fp32 masters) | fp32
    accumulation: int = 1  # micro-batches per optimiser step
    checkpointing: str = "none"  # none | full | selective (keeps matrix products, recomputes the rest)
    compile: bool = False  # torch.compile, block by block
    replicas: int = 1  # fsdp2: shard within groups of processes, replicate this many times (HSDP)
    reshard_after_forward: bool = False  # fsdp2: free context and predictor weights between forward and backward

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "strategy", self.strategy, ("auto", "plain", "ddp", "fsdp2", "deepspeed"))
        _choose(problems, "device", self.device, ("auto", "cpu", "cuda"))
        _choose(problems, "precision", self.precision, ("bf16", "fp32"))
        _choose(problems, "checkpointing", self.checkpointing, ("none", "full", "selective"))
        _at_least(problems, 1, accumulation=self.accumulation, replicas=self.replicas)
        if self.strategy == "deepspeed" and self.ds_config is None:
            problems.append("strategy is deepspeed but ds_config is null; name a file, e.g. ds_configs/zero3.json")
        if self.strategy not in ("auto", "deepspeed") and self.ds_config is not None:
            problems.append(f"ds_config is {self.ds_config!r} but strategy is {self.strategy}; drop one of them")
        if self.replicas > 1 and self.strategy != "fsdp2":
            problems.append(f"replicas is {self.replicas} but strategy is {self.strategy}; HSDP needs fsdp2")
        _raise("engine", problems)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 10  # steps between rows of metrics.jsonl
    tensorboard: bool = True
    progress: str = "auto"  # auto (a bar on a terminal, lines elsewhere) | bar | lines | none

    def __post_init__(self) -> None:
        problems: list[str] = []
        _at_least(problems, 1, every=self.every)
        _choose(problems, "progress", self.progress, ("auto", "bar", "lines", "none"))
        _raise("logging", problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state is written, and how many are kept. One is always written at the end."""

    every: int = 1000  # steps; 0: at the end only
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        problems: list[str] = []
        _at_least(problems, 0, every=self.every)
        _at_least(problems, 1, keep=self.keep)
        _raise("checkpoint", problems)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The online k-nearest-neighbour check of the target encoder, beside the untrained one's figure."""

    every: int = 0  # steps; 0: never
    train: str | None = None  # labelled images that vote
    test: str | None = None  # labelled held-out images
    reader: str = "shards"  # shards | imagefolder
    max_train: int = 10_000  # images taken from each, evenly spread
    max_test: int = 2_000
    neighbors: int = 20
    temperature: float = 0.07  # of the votes' softmax
    batch_size: int = 64  # images per process and forward pass

    def __post_init__(self) -> None:
        problems: list[str] = []
        _choose(problems, "reader", self.reader, ("shards", "imagefolder"))
        _at_least(problems, 0, every=self.every)
        _at_least(problems, 1, max_train=self.max_train, max_test=self.max_test, neighbors=self.neighbors)
        _at_least(problems, 1, batch_size=self.batch_size)
        if not self.temperature > 0:
            problems.append(f"temperature is {self.temperature}; give a number above 0")
        if self.every and (self.train is None or self.test is None):
            problems.append(f"every is {self.every} but train is {self.train} and test is {self.test}; name both")
        _raise("evaluate", problems)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run."""

    folder: str = "runs/pretrain"  # logs, checkpoints and the resolved config
    seed: int = 0
    resume: str = "auto"  # auto (the newest checkpoint in the folder, if any) | none | a checkpoint folder
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(batch_size=2048))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give a number of at least 0")

"""What a run is made of: frozen dataclasses, one per component. Knows no component.

Every field is checked when the dataclass is made, all problems of a section in one message; a
component is handed its own section, never the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ijepa_scale.config.checks import at_least, choose, interval, numbers, raise_problems
from ijepa_scale.config.data import AugmentConfig, DataConfig
from ijepa_scale.errors import ConfigError


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
        at_least(problems, 1, patch_size=self.patch_size, width=self.width, depth=self.depth, heads=self.heads)
        at_least(problems, 1, predictor_width=self.predictor_width, predictor_depth=self.predictor_depth)
        if self.patch_size >= 1 and any(s < self.patch_size or s % self.patch_size for s in pair):
            near = tuple(max(1, round(s / self.patch_size)) * self.patch_size for s in pair)
            problems.append(f"image_size {pair} is no multiple of patch_size {self.patch_size}; try {near}")
        raise_problems("model", problems)

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
        choose(problems, "sampler", self.sampler, ("multiblock", "reference"))
        choose(problems, "context", self.context, ("truncate", "packed"))
        for name in ("context_scale", "target_scale"):
            object.__setattr__(self, name, interval(problems, name, getattr(self, name), 0.0, 1.0))
        object.__setattr__(self, "target_aspect", interval(problems, "target_aspect", self.target_aspect, 1e-3, 1e3))
        at_least(problems, 1, num_context_blocks=self.num_context_blocks, num_target_blocks=self.num_target_blocks)
        at_least(problems, 1, group_size=self.group_size)
        at_least(problems, 0, min_keep=self.min_keep)
        raise_problems("masks", problems)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The distance between predicted and target features."""

    loss: str = "smooth_l1"  # smooth_l1 (the released code) | l2 (the paper's text)
    beta: float = 1.0  # where smooth L1 turns from quadratic to linear

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "loss", self.loss, ("smooth_l1", "l2"))
        if not self.beta > 0:
            problems.append(f"beta is {self.beta}; give a number above 0")
        raise_problems("objective", problems)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. Learning rates are absolute, per optimiser step; no batch-size scaling is applied."""

    # The table of per-parameter states: engines, checkpoints, the planner and exports read it.
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)  # of ZeRO, under which it can run
    zero_reason: ClassVar[str] = ""  # why not under the others

    name: str = "adamw"  # one of registry.OPTIMIZERS
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
        choose(problems, "impl", self.impl, ("auto", "torch", "apex", "deepspeed"))
        at_least(problems, 0, lr=self.lr, start_lr=self.start_lr, final_lr=self.final_lr, eps=self.eps)
        at_least(problems, 0, weight_decay=self.weight_decay, final_weight_decay=self.final_weight_decay)
        num_problems = len(problems)
        betas = numbers(problems, "betas", self.betas, 2)
        object.__setattr__(self, "betas", betas)
        if len(problems) == num_problems and not all(0 <= b < 1 for b in betas):
            problems.append(f"betas is {betas}; give two numbers in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm is {self.clip_norm}; give a number above 0, or null for no clipping")
        raise_problems("optimizer", problems)

    def refusal(self, zero_stage: int) -> str | None:
        """Returns why it can't run under this stage of ZeRO, with the remedy; None where it can."""
        if zero_stage in self.zero_stages:
            return None
        return (
            f"optimizer.name is {self.name} but the ZeRO stage is {zero_stage}: {self.zero_reason}; set "
            "engine.strategy=fsdp2 or ddp, or optimizer.name=adamw"
        )


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
        object.__setattr__(self, "momentum", interval(problems, "momentum", self.momentum, 0.0, 1.0))
        at_least(problems, 0, epochs=self.epochs, warmup_epochs=self.warmup_epochs, stop_after=self.stop_after)
        at_least(problems, 1, steps_per_epoch=self.steps_per_epoch, ipe_scale=self.ipe_scale)
        if not self.epochs > 0:
            problems.append(f"epochs is {self.epochs}; give a number above 0")
        if self.warmup_epochs > self.epochs * self.ipe_scale:
            problems.append(f"warmup_epochs {self.warmup_epochs} is longer than the {self.epochs} epochs of the run")
        raise_problems("schedule", problems)


TRITON = ("target_loss", "target_update")
ATTENTION = ("auto", "flash", "cudnn", "efficient", "math", "fa3", "fa4")
NO_GRAPH = (
    "a graph replays fixed addresses and weights are gathered elsewhere each time; set engine.cuda_graphs=false, "
    "or ddp or ZeRO-1/2"
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step is spread over processes and what it is computed in."""

    strategy: str = "auto"  # auto | plain | ddp | fsdp2 | deepspeed
    ds_config: str | None = None  # DeepSpeed JSON: stage, buckets and offload only
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "bf16"  # bf16 (autocast, fp32 masters) | fp32
    target_precision: str | None = None  # of the target's forward: null (as precision) | fp8 (Hopper and later)
    accumulation: int = 1  # micro-batches per optimiser step
    checkpointing: str = "none"  # none | full | selective (keeps matrix products, recomputes the rest)
    compile: bool = False  # torch.compile, block by block
    compile_cache: str | None = None  # folder of compiled kernels, kept over runs; null: in the user's cache folder
    cuda_graphs: bool = False  # replay the target's forward as a CUDA graph; not where its weights are sharded
    attention: str = "auto"  # kernel of dense attention: auto | flash | cudnn | efficient | math | fa3 | fa4
    zero_communication: str = "fp32"  # under bf16, ZeRO gathers weights and reduces gradients in: fp32 | bf16
    triton: Any = ()  # our kernels in place of PyTorch's, on CUDA: target_loss, target_update
    layer_norm: str = "torch"  # kernel of layer norms: torch (fused by compile) | triton (ours) | apex
    replicas: int = 1  # fsdp2: shard within groups of processes, replicate this many times (HSDP)
    reshard_after_forward: bool = False  # fsdp2: free context and predictor weights between forward and backward

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "strategy", self.strategy, ("auto", "plain", "ddp", "fsdp2", "deepspeed"))
        choose(problems, "device", self.device, ("auto", "cpu", "cuda"))
        choose(problems, "precision", self.precision, ("bf16", "fp32"))
        if self.target_precision not in (None, "fp8"):
            problems.append(f"target_precision is {self.target_precision!r}; choose fp8, or null")
        if self.target_precision == "fp8" and self.precision != "bf16":
            problems.append(f"target_precision is fp8 but precision is {self.precision}; set precision=bf16 beside it")
        choose(problems, "checkpointing", self.checkpointing, ("none", "full", "selective"))
        choose(problems, "attention", self.attention, ATTENTION)
        named = () if self.triton is None else (self.triton,) if isinstance(self.triton, str) else self.triton
        if not isinstance(named, (list, tuple)):
            problems.append(f"triton is {self.triton!r}; give a list of {', '.join(TRITON)}")
            named = ()
        object.__setattr__(self, "triton", tuple(named))
        choose(problems, "layer_norm", self.layer_norm, ("torch", "triton", "apex"))
        for name in self.triton:
            choose(problems, "triton", name, TRITON)
        choose(problems, "zero_communication", self.zero_communication, ("fp32", "bf16"))
        at_least(problems, 1, accumulation=self.accumulation, replicas=self.replicas)
        if self.strategy == "deepspeed" and self.ds_config is None:
            problems.append("strategy is deepspeed but ds_config is null; name a file, e.g. ds_configs/zero3.json")
        if self.strategy not in ("auto", "deepspeed") and self.ds_config is not None:
            problems.append(f"ds_config is {self.ds_config!r} but strategy is {self.strategy}; drop one of them")
        if self.replicas > 1 and self.strategy != "fsdp2":
            problems.append(f"replicas is {self.replicas} but strategy is {self.strategy}; HSDP needs fsdp2")
        if self.cuda_graphs and self.strategy == "fsdp2":
            problems.append(f"cuda_graphs is true but strategy is fsdp2: {NO_GRAPH}")
        problems.extend(self._without_effect())
        raise_problems("engine", problems)

    def _without_effect(self) -> Iterator[str]:
        """Yields the settings that ask for something and would change nothing."""
        if self.zero_communication == "bf16":
            if self.strategy != "deepspeed" and (self.strategy != "auto" or self.ds_config is None):
                strategy = "auto without a ds_config" if self.strategy == "auto" else self.strategy
                yield f"zero_communication is bf16 but strategy is {strategy}: only ZeRO reads it; set it to fp32"
            if self.precision != "bf16":
                yield f"zero_communication is bf16 but precision is {self.precision}; set one to the other's"
        if self.compile_cache is not None and not self.compile:
            yield f"compile_cache is {self.compile_cache!r} but compile is false; set compile=true, or it to null"


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 10  # steps between rows of metrics.jsonl
    tensorboard: bool = True
    progress: str = "auto"  # auto (a bar on a terminal, lines elsewhere) | bar | lines | none

    def __post_init__(self) -> None:
        problems: list[str] = []
        at_least(problems, 1, every=self.every)
        choose(problems, "progress", self.progress, ("auto", "bar", "lines", "none"))
        raise_problems("logging", problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state is written, and how many are kept. One is always written at the end."""

    every: int = 1000  # steps; 0: at the end only
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        problems: list[str] = []
        at_least(problems, 0, every=self.every)
        at_least(problems, 1, keep=self.keep)
        raise_problems("checkpoint", problems)


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
        choose(problems, "reader", self.reader, ("shards", "imagefolder"))
        at_least(problems, 0, every=self.every)
        at_least(problems, 1, max_train=self.max_train, max_test=self.max_test, neighbors=self.neighbors)
        at_least(problems, 1, batch_size=self.batch_size)
        if not self.temperature > 0:
            problems.append(f"temperature is {self.temperature}; give a number above 0")
        if self.every and (self.train is None or self.test is None):
            problems.append(f"every is {self.every} but train is {self.train} and test is {self.test}; name both")
        raise_problems("evaluate", problems)


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

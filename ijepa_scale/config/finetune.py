"""What a finetuning run trains and how: sections beside those of pretraining. Knows no component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ijepa_scale.config.checks import at_least, choose, numbers, raise_problems
from ijepa_scale.config.schema import ModelConfig, OptimizerConfig
from ijepa_scale.errors import ConfigError

LR_BATCH = 256  # images that `base_lr` is for. Source: arXiv 2111.06377, appendix A.1
REPRESENTATIONS = ("last", "last4")
POOL_NORMS = ("after", "before")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """An encoder with a linear layer on its pooled tokens, and the weights it starts from.

    A size left null is the named architecture's.
    """

    name: str = "vit_base"  # vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant
    image_size: Any = 224  # pixels: one number, or [height, width]
    patch_size: int = 16  # pixels
    width: int | None = None  # token width
    depth: int | None = None  # blocks
    heads: int | None = None  # attention heads
    mlp_ratio: float | None = None  # MLP width / token width
    num_classes: int = 1000
    drop_path: float = 0.1  # rate of the last block; linear in depth from 0 at the first
    representation: str = "last"  # last: mean of the last block's tokens | last4: those of the last 4, side by side
    pool_norm: str = "after"  # after: a new norm behind the mean | before: the encoder's trained norm, before it
    frozen_blocks: int = 0  # the first so many blocks stay as loaded; with any, the patch embedding too
    init: str | None = None  # run folder, checkpoint, .pth.tar, .safetensors, or timm:NAME; null: random weights
    weights: str = "target"  # target | context: which encoder of the file
    keep_head: bool = False  # true: the file's classification layer is loaded too, its classes being the same

    def __post_init__(self) -> None:
        problems: list[str] = []
        encoder = None
        try:
            encoder = self.encoder
        except ConfigError as error:
            problems += [line.removeprefix("model.") for line in str(error).splitlines()]
        else:
            object.__setattr__(self, "image_size", encoder.image_size)
        at_least(problems, 1, num_classes=self.num_classes)
        at_least(problems, 0, frozen_blocks=self.frozen_blocks)
        if not 0 <= self.drop_path < 1:
            problems.append(f"drop_path is {self.drop_path}; give a rate of at least 0 and below 1")
        choose(problems, "representation", self.representation, REPRESENTATIONS)
        choose(problems, "pool_norm", self.pool_norm, POOL_NORMS)
        choose(problems, "weights", self.weights, ("target", "context"))
        if self.keep_head and self.init is None:
            problems.append("keep_head is true but init is null; name the file whose head is kept, or set it to false")
        raise_problems("model", problems)

    @property
    def encoder(self) -> ModelConfig:
        """The encoder alone."""
        sizes = ("name", "image_size", "patch_size", "width", "depth", "heads", "mlp_ratio")
        return ModelConfig(**{size: getattr(self, size) for size in sizes})

    @property
    def num_layers(self) -> int:
        """Blocks whose tokens are pooled."""
        return {"last": 1, "last4": 4}[self.representation]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerConfig:
    """AdamW with a learning rate that falls from the head to the patches, its warm-up and cosine.

    Source of the defaults: arXiv 2111.06377, appendix A.1 (ViT-L).
    """

    impl: str = "auto"  # auto | torch | apex | deepspeed
    base_lr: float | None = None  # of 256 images; the rate is base_lr * batch / 256. null with lr null: 1e-3
    lr: float | None = None  # absolute; give this or base_lr
    min_lr: float = 1e-6  # absolute, where the cosine ends (before layer-wise scaling)
    weight_decay: float = 0.05  # constant; none on 1-D parameters and position embeddings
    layer_decay: float = 0.75  # in (0, 1]: each block's rate over the next one's; 1: one rate for all
    betas: Any = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None  # global gradient norm; null: no clipping
    epochs: float = 50
    warmup_epochs: float = 5  # from 0, step by step
    ema: float | None = None  # momentum of averaged weights, e.g. 0.9999, which are then evaluated; null: none

    def __post_init__(self) -> None:
        problems: list[str] = []
        choose(problems, "impl", self.impl, ("auto", "torch", "apex", "deepspeed"))
        if self.base_lr is None and self.lr is None:
            object.__setattr__(self, "base_lr", 1e-3)
        elif self.base_lr is not None and self.lr is not None:
            problems.append(f"base_lr is {self.base_lr} and lr is {self.lr}; give one of them")
        at_least(problems, 0, base_lr=self.base_lr, lr=self.lr, min_lr=self.min_lr, eps=self.eps)
        at_least(problems, 0, weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs)
        if not 0 < self.layer_decay <= 1:
            problems.append(
                f"layer_decay is {self.layer_decay}; give a number above 0 and at most 1, which is no decay: "
                "above 1 the patches would move faster than the head"
            )
        num_problems = len(problems)
        betas = numbers(problems, "betas", self.betas, 2)
        object.__setattr__(self, "betas", betas)
        if len(problems) == num_problems and not all(0 <= b < 1 for b in betas):
            problems.append(f"betas is {betas}; give two numbers in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm is {self.clip_norm}; give a number above 0, or null for no clipping")
        if not self.epochs > 0:
            problems.append(f"epochs is {self.epochs}; give a number above 0")
        elif self.warmup_epochs >= self.epochs:
            problems.append(
                f"warmup_epochs {self.warmup_epochs} leaves nothing of the {self.epochs} epochs; give fewer"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            problems.append(f"ema is {self.ema}; give a momentum above 0 and below 1, or null for none")
        raise_problems("optimizer", problems)

    def peak_lr(self, batch_size: int) -> float:
        """Returns the rate at the end of the warm-up, for `batch_size` images of all processes and micro-batches."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * batch_size / LR_BATCH

    def adamw(self, batch_size: int) -> OptimizerConfig:
        """Returns what engines take: AdamW's settings; the schedule sets its rates at each step."""
        return OptimizerConfig(
            impl=self.impl, lr=self.peak_lr(batch_size), betas=self.betas, eps=self.eps, clip_norm=self.clip_norm
        )

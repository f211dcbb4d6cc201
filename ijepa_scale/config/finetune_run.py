"""What a finetuning run is made of, by the MAE recipe (arXiv 2111.06377, appendix A.1). Knows no component."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from typing_extensions import override

from ijepa_scale.config import form
from ijepa_scale.config.data import CropConfig, DataConfig, Reader
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.config.rand_augment_notation import parse
from ijepa_scale.config.schema import (
    INIT,
    INIT_POSITIONS,
    AdamWConfig,
    CheckpointConfig,
    EncoderConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
)
from ijepa_scale.config.section import Section
from ijepa_scale.config.spikes import SpikesConfig

LR_BATCH = 256  # images that `base_lr` is for. Source: arXiv 2111.06377, appendix A.1
_SMALL_IMAGE, _WHOLE_IMAGE = 64, 224  # pixels


class ClassifierConfig(Section, at="model"):
    """An encoder with a linear layer on its pooled tokens, and the weights to start from."""

    encoder: EncoderConfig = EncoderConfig()
    num_classes: form.Count = Field(1000, description="Number of classes.")
    drop_path: float = Field(0.1, ge=0, lt=1, description="Drop path of the last block; linear from 0 at the first.")
    representation: Literal["last", "last4"] = Field(
        "last", description="Mean of the last block's tokens, or of each of the last 4, concatenated."
    )
    pool_norm: Literal["after", "before"] = Field(
        "after", description="A new norm after the mean, or the encoder's trained norm before it."
    )
    frozen_blocks: int = Field(
        0, ge=0, description="Number of first blocks to freeze, together with the patch embedding."
    )
    init: form.PathText | None = Field(None, description=f"{INIT}; null: random weights.")
    init_positions: form.Positions = Field("interpolated", description=INIT_POSITIONS)
    weights: Literal["target", "context"] = Field("target", description="Which encoder of the file to load.")
    keep_head: bool = Field(
        False, description="Also load the file's classification layer; its classes must be the same."
    )

    def _problems(self) -> Iterator[str]:
        if self.init is None and "patch_size" not in self.encoder.model_fields_set:
            yield from (f"encoder.{problem}" for problem in self.encoder.misfit())
        if self.keep_head and self.init is None:
            yield "keep_head is true but init is null; name the file whose head is kept, or set it to false"

    @property
    def pretrained(self) -> ModelConfig:
        """The encoder with a predictor of the default size, as planning counts."""
        return ModelConfig(**self.encoder.values())

    @property
    def num_layers(self) -> int:
        """Blocks whose tokens are pooled."""
        return {"last": 1, "last4": 4}[self.representation]


class FinetuneOptimizerConfig(Section, at="optimizer"):
    """AdamW with a learning rate that falls from the head to the patches."""

    impl: form.AdamWCode = Field(
        "auto", description="Implementation; auto is PyTorch's fused kernel, fused_tail (CUDA) also updates the EMA."
    )
    base_lr: form.AtLeast0 | None = Field(None, description="Learning rate per 256 images; 1e-3 if lr is null.")
    lr: form.AtLeast0 | None = Field(None, description="Absolute learning rate, instead of base_lr.")
    min_lr: form.AtLeast0 = Field(
        1e-6, description="Absolute learning rate at the end of the cosine, before layer-wise scaling."
    )
    weight_decay: form.AtLeast0 = Field(0.05, description="Constant; none on 1-D parameters and position embeddings.")
    layer_decay: float = Field(
        0.75, gt=0, le=1, description="Learning rate of each block divided by the next one's; 1: one rate for all."
    )
    betas: form.Betas = Field((0.9, 0.999), description="Decay of the two moments.")
    eps: form.AtLeast0 = Field(1e-8, description="Added to the root of the second moment.")
    clip_norm: form.Positive | None = Field(None, description="Largest norm of the gradient; null clips nothing.")
    ema: float | None = Field(None, gt=0, lt=1, description="Momentum of averaged weights, which are then evaluated.")

    def _problems(self) -> Iterator[str]:
        if self.base_lr is None and self.lr is None:
            object.__setattr__(self, "base_lr", 1e-3)
        elif self.base_lr is not None and self.lr is not None:
            yield f"base_lr is {self.base_lr} and lr is {self.lr}; give one of them"

    def peak_lr(self, batch_size: int) -> float:
        """Returns the rate at the end of the warm-up, for `batch_size` images of all processes and micro-batches."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * batch_size / LR_BATCH

    def adamw(self, batch_size: int) -> AdamWConfig:
        """Returns what engines take: AdamW's settings; the schedule sets its rates at each step."""
        return AdamWConfig(
            impl=self.impl, lr=self.peak_lr(batch_size), betas=self.betas, eps=self.eps, clip_norm=self.clip_norm
        )


class FinetuneScheduleConfig(Section, at="schedule"):
    """Length of the run and of its warm-up; a cosine follows, which ends with the run."""

    epochs: form.Epochs = Field(50.0, gt=0, description="Length of the run.")
    warmup_epochs: form.Epochs = Field(5.0, ge=0, description="Length of the warm-up from 0, step by step.")
    stop_after: form.Steps | None = Field(None, ge=0, description="Stop at this step; the curve stays as it is.")

    def _problems(self) -> Iterator[str]:
        if self.warmup_epochs >= self.epochs:
            yield f"warmup_epochs {self.warmup_epochs:g} leaves nothing of the {self.epochs:g} epochs; give fewer"


def _notation(text: str) -> str:
    parse(text)
    return text


class FinetuneAugmentConfig(CropConfig):
    """The MAE recipe's augmentation, drawn per sample and run on the device. Source: arXiv 2111.06377, appendix A.1."""

    crop_scale: form.CropScale = Field((0.08, 1.0), description="Share of the image's area that a crop covers.")
    interpolation: form.Interpolation = Field("bicubic", description="How crops are resized, and RandAugment's images.")
    flip: form.Fraction = Field(0.5, description="Probability of a horizontal flip.")
    rand_augment: Annotated[str, AfterValidator(_notation)] | None = Field(
        "rand-m9-mstd0.5-inc1", description="RandAugment in timm's notation; null: none."
    )
    color_jitter: form.AtLeast0 = Field(0.0, description="Brightness, contrast, saturation by 1 - s to 1 + s; 0: off.")
    random_erasing: form.Fraction = Field(0.25, description="Probability of random erasing.")
    mixup: form.AtLeast0 = Field(0.8, description="Alpha of mixup's Beta distribution; 0: none.")
    cutmix: form.AtLeast0 = Field(1.0, description="Alpha of CutMix's Beta distribution; 0: none.")
    mix_probability: form.Fraction = Field(1.0, description="Probability that a pair is mixed at all.")
    switch_probability: form.Fraction = Field(0.5, description="Probability of CutMix if both are on.")
    label_smoothing: form.Fraction = Field(0.1, description="Share of a label that is spread over all classes.")

    @override
    def misfits(self, pixels: PixelFormat) -> Iterator[str]:
        yield from super().misfits(pixels)
        for name, off in (("rand_augment", "null"), ("color_jitter", "0")):
            if getattr(self, name) and not pixels.is_rgb8:
                yield (
                    f"{name} is {getattr(self, name)}, but images have {pixels}, and it changes 8-bit RGB images only; "
                    f"set it to {off}"
                )


class ClassifierEvaluationConfig(Section, at="evaluate"):
    """Accuracy on held-out images, over all processes, each image once."""

    test: form.PathText | None = Field(
        None, description="Labelled held-out images, as in data.train; null: no evaluation."
    )
    reader: Reader = Field("shards", description="How the images are stored, as in data.reader; not stream.")
    every_epochs: form.Epochs = Field(
        1.0, gt=0, description="Epochs between evaluations; there is always one at the end."
    )
    batch_size: form.Images = Field(64, description="Images per process and forward pass.")
    crop_fraction: float | None = Field(
        None, gt=0, le=1, description="Centre crop / resized side; null: 0.875, but 1 up to 64 and above 224 pixels."
    )
    workers: int = Field(2, ge=0, description="Decoding processes per training process.")

    def crop_of(self, image_size: tuple[int, int]) -> float:
        """Returns the crop fraction for images of that size, pixels.

        Source: MAE's util/datasets.py for all but the small ones, with 0.875 for its 224 / 256.
        """
        if self.crop_fraction is not None:
            return self.crop_fraction
        return 0.875 if _SMALL_IMAGE < max(image_size) <= _WHOLE_IMAGE else 1.0


class FinetuneConfig(RunConfig):
    """A finetuning run."""

    folder: form.PathText = Field(
        "runs/finetune", description="Folder of logs, checkpoints, results and the configuration."
    )
    model: ClassifierConfig = ClassifierConfig()
    data: DataConfig = DataConfig(batch_size=1024)
    augment: FinetuneAugmentConfig = FinetuneAugmentConfig()
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig()
    engine: EngineConfig = EngineConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: ClassifierEvaluationConfig = ClassifierEvaluationConfig()
    spikes: SpikesConfig = SpikesConfig()

    def _problems(self) -> Iterator[str]:
        yield from self._format(self.model.encoder.channels)
        if self.engine.target_precision is not None:
            precision = self.engine.target_precision
            yield f"engine.target_precision is {precision}; finetuning has no target: set it to null"
        if self.data.reader == "stream":
            yield ("data.reader is stream; finetuning counts epochs and labels: use data.reader=shards or imagefolder")

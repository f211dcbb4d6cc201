"""What a pretraining run is made of: its sections, one per component. Knows no component."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from ijepa_scale.config import form
from ijepa_scale.config.data import AugmentConfig, CropConfig, DataConfig, Reader
from ijepa_scale.config.health import HealthConfig
from ijepa_scale.config.pixels import MAX_CHANNELS, PixelFormat
from ijepa_scale.config.section import Section
from ijepa_scale.config.spikes import SpikesConfig
from ijepa_scale.registry import EVALUATORS, OBJECTIVES, OPTIMIZERS, SAMPLERS, SINKS

Attention = Literal["auto", "flash", "cudnn", "efficient", "math", "fa3", "fa4"]
NO_GRAPH = (
    "a graph replays fixed addresses and weights are gathered elsewhere each time; set engine.cuda_graphs=false, "
    "or ddp or ZeRO-1/2"
)

# Of both kinds of training.
INIT = "Run, checkpoint, .pth.tar, .safetensors, published:, timm: or transformers:NAME to start from, with its sizes"
INIT_POSITIONS = "Positions if the grid differs from that of init: interpolated, or computed for the new grid."


class EncoderConfig(Section, at="model.encoder"):
    """The encoder. A size left null is the named architecture's."""

    name: str = Field("vit_base", description="One of vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant.")
    image_size: form.ImageSize = Field((224, 224), description="Side of a square image, or [height, width].")
    patch_size: form.Pixels = Field(16, description="Side of a patch; the sides of the image are multiples of it.")
    channels: int = Field(
        3, ge=1, le=MAX_CHANNELS, description="Channels of an image; 3 with 8 bits are red, green and blue."
    )
    width: form.Count | None = Field(None, description="Width of a token.")
    depth: form.Count | None = Field(None, description="Number of blocks.")
    heads: form.Count | None = Field(None, description="Number of attention heads; a predictor has as many.")
    mlp_ratio: float | None = Field(None, description="Width of an MLP divided by that of a token.")
    position_grid: tuple[form.Count, form.Count] | None = Field(
        None, description="Grid [rows, columns] that positions are computed for, then interpolated; null: the image's."
    )

    def _problems(self) -> Iterator[str]:
        if "patch_size" in self.model_fields_set:  # otherwise a source of weights may give it
            yield from self.misfit()

    def misfit(self) -> Iterator[str]:
        """Yields what is wrong between the size of images and that of patches."""
        size, patch = self.image_size, self.patch_size
        if any(side < patch or side % patch for side in size):
            near = tuple(max(1, round(side / patch)) * patch for side in size)
            yield f"image_size {size} isn't a multiple of patch_size {patch}; try {near}"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class ModelConfig(EncoderConfig, at="model"):
    """Encoder and predictor. A size left null is the named architecture's."""

    predictor_width: form.Count = Field(384, description="Width of a token in the predictor.")
    predictor_depth: form.Count | None = Field(None, description="Number of blocks of the predictor.")
    rescale_residual: bool = Field(
        False,
        description="Divide attn.proj and mlp.fc2 by sqrt(2 * layer), which the published code fails to do.",
    )
    init: form.PathText | None = Field(None, description=f"{INIT}; null: random weights.")
    init_positions: form.Positions = Field("interpolated", description=INIT_POSITIONS)
    init_state: Literal["weights", "training"] = Field(
        "weights",
        description="Start at step 0 with the weights only, or continue with optimiser state and step.",
    )

    def _problems(self) -> Iterator[str]:
        if self.init is None or "patch_size" in self.model_fields_set:
            yield from self.misfit()
        if self.init_state == "training" and self.init is None:
            yield "init_state is training but init is null; name the run or .pth.tar to go on from, or choose weights"


class MaskConfig(Section, at="masks", registry=SAMPLERS, selector="sampler"):
    """Context and target blocks of patches."""

    sampler: str = Field("multiblock", description="How masks are drawn; reference is the published draw.")
    context: Literal["truncate", "packed"] = Field(
        "truncate",
        description="Truncate contexts to the shortest in their group, or pack every token into one sequence.",
    )
    num_context_blocks: form.Count = Field(1, description="Context blocks of an image.")
    num_target_blocks: form.Count = Field(4, description="Target blocks of an image.")
    min_keep: int = Field(10, ge=0, description="A block must keep more patches than this.")
    group_size: form.Images = Field(128, description="Images that share block sizes and are truncated to one length.")


class BlockMaskConfig(MaskConfig):
    """Context and target blocks. Scales are shares of the patch grid, aspects height / width."""

    context_scale: form.Shares = Field((0.85, 1.0), description="Share of the grid that a context block covers.")
    target_scale: form.Shares = Field((0.15, 0.2), description="Share of the grid that a target block covers.")
    target_aspect: form.Aspects = Field((0.75, 1.5), description="Height of a target block divided by its width.")
    allow_overlap: bool = Field(False, description="Keep the patches of targets in the context.")


class ObjectiveConfig(Section, at="objective", registry=OBJECTIVES, selector="loss"):
    """What training minimises."""

    loss: str = Field(
        "smooth_l1", description="Distance between predicted and target features; the paper's text has l2."
    )


class RegressionConfig(ObjectiveConfig):
    """The distance between predicted and target features."""

    beta: form.Positive = Field(1.0, description="Distance at which smooth L1 turns from quadratic to linear.")


class OptimizerConfig(Section, at="optimizer", registry=OPTIMIZERS, selector="name"):
    """Optimiser and its rates. Learning rates are absolute and don't depend on the batch size."""

    # The table of per-parameter states: engines, checkpoints, the planner and exports read it.
    state_names: ClassVar[tuple[str, ...]] = ()
    zero_stages: ClassVar[tuple[int, ...]] = ()  # of ZeRO, under which it can run
    zero_reason: ClassVar[str] = "ZeRO hands it flat slices of many weights, which it doesn't declare to take"

    name: str = Field("adamw", description="The optimiser.")
    lr: form.AtLeast0 = Field(1e-3, description="Learning rate at the end of the warm-up.")
    start_lr: form.AtLeast0 = Field(2e-4, description="Learning rate at the start of the warm-up.")
    final_lr: form.AtLeast0 = Field(1e-6, description="Learning rate that the cosine ends at.")
    weight_decay: form.AtLeast0 = Field(0.04, description="Weight decay at the start; none for biases and norms.")
    final_weight_decay: form.AtLeast0 = Field(0.4, description="Weight decay at the end.")
    clip_norm: form.Positive | None = Field(None, description="Largest gradient norm; null: no clipping.")

    @property
    def renews_copies(self) -> bool:
        """Whether it renews bf16 copies of the weights as it moves them, so that no forward casts weights."""
        return False

    def refusal(self, zero_stage: int) -> str | None:
        """Returns why it can't run under this stage of ZeRO, with the remedy; None where it can."""
        if zero_stage in self.zero_stages:
            return None
        return (
            f"optimizer.name is {self.name} but the ZeRO stage is {zero_stage}: {self.zero_reason}; set "
            "engine.strategy=fsdp2 or ddp, or optimizer.name=adamw"
        )


class AdamWConfig(OptimizerConfig):
    """AdamW. Learning rates are absolute, per optimiser step; no batch-size scaling is applied."""

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)

    impl: form.AdamWCode = Field(
        "auto",
        description="Implementation; auto is PyTorch's fused kernel, fused_tail (CUDA) also updates the target.",
    )
    betas: form.Betas = Field((0.9, 0.999), description="Decay of the two moments.")
    eps: form.AtLeast0 = Field(1e-8, description="Added to the root of the second moment.")

    @property
    @override
    def renews_copies(self) -> bool:
        return self.impl == "fused_tail"

    @override
    def refusal(self, zero_stage: int) -> str | None:
        if self.impl == "fused_tail":
            return (
                f"optimizer.impl is fused_tail but the ZeRO stage is {zero_stage}: ZeRO steps flat slices of many "
                "weights and then gathers them, so target and copies can't move in the same pass; set "
                "optimizer.impl=torch, or engine.strategy=fsdp2 or ddp"
            )
        return super().refusal(zero_stage)


class ScheduleConfig(Section, at="schedule"):
    """Length of the run, and its schedules."""

    epochs: form.Epochs = Field(300.0, gt=0, description="Length of the run.")
    warmup_epochs: form.Epochs = Field(40.0, ge=0, description="Length of the warm-up.")
    ipe_scale: float = Field(1.0, ge=1, description="Factor that stretches the schedules beyond the end of the run.")
    momentum: form.Shares = Field((0.996, 1.0), description="EMA momentum of the target, at the first and last step.")
    steps_per_epoch: form.Steps | None = Field(
        None, ge=1, description="Length of an epoch; null: as many steps as the data has batches."
    )
    stop_after: form.Steps | None = Field(None, ge=0, description="Stop at this step, with unchanged schedules.")

    def _problems(self) -> Iterator[str]:
        if self.warmup_epochs > self.epochs * self.ipe_scale:
            yield f"warmup_epochs {self.warmup_epochs:g} is longer than the {self.epochs:g} epochs of the run"


class EngineConfig(Section, at="engine"):
    """How the step is distributed over processes, and its precision and kernels."""

    strategy: Literal["auto", "plain", "ddp", "fsdp2", "deepspeed"] = Field(
        "auto", description="How training is distributed over processes."
    )
    ds_config: form.PathText | None = Field(None, description="DeepSpeed's JSON: stage, buckets and offload only.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Kind of device.")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 means autocast over fp32 weights.")
    target_precision: Literal["fp8"] | None = Field(
        None,
        description="Precision of the target's forward; null: that of `precision`. fp8: Hopper or later, compiled.",
    )
    fp8_fast_accumulation: bool = Field(
        False, description="Sum fp8 products with fewer bits, on CUDA: faster and less exact."
    )
    accumulation: form.Count = Field(1, description="Micro-batches per optimiser step.")
    checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="Recompute activations: none, all, or all but matrix products."
    )
    compile: form.Switch = Field(
        "auto", description="torch.compile, block by block; auto is on for CUDA where possible, off on the CPU."
    )
    compile_cache: form.PathText | None = Field(
        None, description="Folder of compiled kernels; null: in the user's cache folder."
    )
    deterministic: bool = Field(
        False, description="Repeat results bit for bit on the same GPUs, with slower steps; CPUs always do."
    )
    cuda_graphs: bool = Field(False, description="Replay the target's forward as a CUDA graph; not under fsdp2.")
    attention: Attention = Field("auto", description="Kernel of dense attention; auto chooses one for each network.")
    zero_communication: Literal["fp32", "bf16"] = Field(
        "fp32", description="Type in which ZeRO gathers weights and reduces gradients, in bf16 runs."
    )
    triton: form.Kernels = Field((), description="Triton kernels to use instead of PyTorch's, on CUDA.")
    layer_norm: Literal["torch", "apex"] = Field("torch", description="Kernel of layer norms; apex isn't compiled.")
    replicas: form.Count = Field(1, description="fsdp2: number of replicas, each sharded over processes (HSDP).")
    reshard_after_forward: bool = Field(
        False, description="fsdp2: free context and predictor weights between forward and backward."
    )
    start_timeout: form.Seconds = Field(300.0, gt=0, description="Longest wait for all processes at the start.")
    hang_timeout: form.Seconds = Field(
        600.0, lt=1800, description="End the run if no step ends for this long; 0: never."
    )
    link_timeout: form.Seconds = Field(
        20.0, lt=1800, description="End the run if a process or its host is silent for this long; 0: never."
    )

    def _problems(self) -> Iterator[str]:
        strategy, precision = self.strategy, self.precision
        if self.target_precision == "fp8" and precision != "bf16":
            yield f"target_precision is fp8 but precision is {precision}; set precision=bf16 too"
        if self.fp8_fast_accumulation and self.target_precision != "fp8":
            yield "fp8_fast_accumulation is true but target_precision is null; set fp8_fast_accumulation=false"
        if strategy == "deepspeed" and self.ds_config is None:
            yield "strategy is deepspeed but ds_config is null; name a file, e.g. ds_configs/zero3.json"
        if strategy not in ("auto", "deepspeed") and self.ds_config is not None:
            yield f"ds_config is {self.ds_config!r} but strategy is {strategy}; drop one of them"
        if self.replicas > 1 and strategy != "fsdp2":
            yield f"replicas is {self.replicas} but strategy is {strategy}; HSDP needs fsdp2"
        if self.cuda_graphs and strategy == "fsdp2":
            yield f"cuda_graphs is true but strategy is fsdp2: {NO_GRAPH}"
        if self.zero_communication == "bf16":
            if strategy != "deepspeed" and (strategy != "auto" or self.ds_config is None):
                said = "auto without a ds_config" if strategy == "auto" else strategy
                yield f"zero_communication is bf16 but strategy is {said}: only ZeRO reads it; set it to fp32"
            if precision != "bf16":
                yield f"zero_communication is bf16 but precision is {precision}; set one to the other's"
        if self.layer_norm == "apex" and self.compile is True:
            yield "layer_norm is apex but compile is true: torch.compile can't trace apex; set layer_norm=torch"
        if self.compile_cache is not None and self.compile is False:
            remedy = "set compile=auto or compile_cache=null"
            yield f"compile_cache is {self.compile_cache!r} but compile is false; {remedy}"


class SinkConfig(Section, at="logging.sinks", registry=SINKS):
    """Settings of a metrics sink."""


class LoggingConfig(Section, at="logging"):
    """What is written during training."""

    every: form.Steps = Field(10, ge=1, description="Steps between rows of metrics.jsonl.")
    tensorboard: bool = Field(True, description="Write the rows for TensorBoard too.")
    progress: Literal["auto", "bar", "lines", "none"] = Field(
        "auto", description="How progress is shown; auto is a bar on a terminal, and lines elsewhere."
    )
    sinks: dict[str, SinkConfig] = Field(
        {}, description="Further sinks, each with its own settings; false removes one."
    )


class CheckpointConfig(Section, at="checkpoint"):
    """When checkpoints are written, and how many are kept. One is always written at the end."""

    every: form.Steps = Field(1000, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep: form.Count = Field(2, description="Number of newest checkpoints to keep.")
    keep_every: form.Steps = Field(
        0, ge=0, description="Also keep checkpoints at multiples of this step forever; 0: none."
    )
    asynchronous: bool = Field(
        True,
        description="Training goes on while a checkpoint is written, from a copy in host memory of what each process "
        "saves.",
    )
    max_failures: form.Count = Field(
        3, description="Failed saves in a row, for example on a full disk, that end the run with code 74."
    )


class EvaluateConfig(Section, at="evaluate", registry=EVALUATORS, selector="evaluator"):
    """Evaluation of the target encoder during training."""

    evaluator: str = Field("knn", description="What evaluates the target encoder.")
    every: form.Steps = Field(0, ge=0, description="Steps between evaluations; 0: never.")


class KnnConfig(EvaluateConfig):
    """Accuracies of k nearest neighbours and of a linear layer, next to those of the untrained encoder."""

    train: form.PathText | None = Field(None, description="Labelled images to find neighbours in.")
    test: form.PathText | None = Field(None, description="Labelled held-out images.")
    reader: Reader = Field("shards", description="How the images are stored, as in data.reader; not stream.")
    max_train: form.Images = Field(
        10_000, description="Largest number of images to find neighbours in, evenly spread over the set."
    )
    max_test: form.Images = Field(2_000, description="Largest number of held-out images, evenly spread over the set.")
    neighbors: form.Count = Field(20, description="Neighbours that vote.")
    temperature: form.Positive = Field(0.07, description="Temperature of the votes' softmax.")
    batch_size: form.Images = Field(64, description="Images per process and forward pass.")

    def _problems(self) -> Iterator[str]:
        if self.every and (self.train is None or self.test is None):
            yield f"every is {self.every} but train is {self.train} and test is {self.test}; name both"


class RunConfig(Section):
    """What every run has."""

    folder: form.PathText = Field(
        "runs/pretrain", description="Folder of logs, checkpoints and the resolved configuration."
    )
    seed: int = Field(0, ge=0, description="Seed of everything random: weights, order, crops and so on.")
    resume: form.PathText = Field(
        "auto", description="The newest checkpoint of the folder (auto), none, or a checkpoint folder."
    )

    def _format(self, channels: int) -> Iterator[str]:
        """Leaves the normalisation open where ImageNet's can't be meant; yields what doesn't fit the images' format."""
        data: DataConfig = getattr(self, "data")  # noqa: B009  # of both kinds of run
        augment: CropConfig = getattr(self, "augment")  # noqa: B009
        pixels = PixelFormat(channels, data.pixels)
        fitting = augment.for_format(pixels)
        if fitting is not augment:
            object.__setattr__(self, "augment", fitting)
        yield from (f"augment.{line}" for line in fitting.misfits(pixels))


class PretrainConfig(RunConfig):
    """A pretraining run."""

    recipe: Literal["own_images"] | None = Field(
        None, description="With own_images, a run chooses unset values to suit its images and its machine."
    )
    chosen_by_recipe: tuple[str, ...] = Field(
        (), description="What a recipe chose, and why; written to the run's config.yaml, never read."
    )
    model: ModelConfig = ModelConfig()
    masks: MaskConfig = BlockMaskConfig()
    data: DataConfig = DataConfig(batch_size=2048)
    augment: AugmentConfig = AugmentConfig()
    objective: ObjectiveConfig = RegressionConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = KnnConfig()
    health: HealthConfig = HealthConfig()
    spikes: SpikesConfig = SpikesConfig()

    def _problems(self) -> Iterator[str]:
        yield from self._format(self.model.channels)

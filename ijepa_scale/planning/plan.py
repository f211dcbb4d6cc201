"""Plans a run before its launch: what fits, what it costs, how long it takes, and which strategy to use.

Everything is computed from formulas; nothing is measured. `plan_text` formats the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import EngineConfig, ModelConfig, OptimizerConfig, PretrainConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.activations import Activations, activations
from ijepa_scale.planning.devices import Cluster
from ijepa_scale.planning.flops import FlopCount, mask_flops
from ijepa_scale.planning.footprint import Footprint, footprint, largest_micro_batch, usable_bytes, usual_tokens
from ijepa_scale.planning.parameters import ParameterCounts, count_parameters
from ijepa_scale.planning.roofline import Range, estimate_mfu
from ijepa_scale.planning.spread import Spread, ZeroBuckets
from ijepa_scale.planning.step_time import StepTime, step_time
from ijepa_scale.planning.strategy import resolve_compile, resolve_engine
from ijepa_scale.planning.tokens import Tokens, draw_masks
from ijepa_scale.plurals import counted

CHECKPOINTING = ("none", "selective", "full")
FP32_MFU = 0.5  # share of the bf16 peak, an assumption: no peak is known for fp32
IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122  # training images, as counted by ImageNet


@dataclass(frozen=True, kw_only=True)
class PlannedStrategy:
    """One way to spread the run's step over GPUs, with its memory and time."""

    spread: Spread
    footprint: Footprint  # with the run's micro-batch and the largest masks drawn
    fits: bool
    largest_micro_batch: int  # images per GPU at once; 0 if not even one fits
    mfu: Range  # share of the peak that is reached while computing, lowest and highest; equal if it was given
    time: StepTime  # at the middle of `mfu`
    range_s: Range  # of a step, at the highest and the lowest of `mfu`


Needs = Callable[[Spread, str, int, bool], Footprint]  # by strategy, checkpointing, images at once, graphs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs and the duration of a run. Bytes are per GPU, FLOPs per image."""

    config: PretrainConfig | FinetuneConfig
    compiled: bool  # whether blocks are compiled
    cluster: Cluster
    mfu_source: str  # given, estimated or assumed
    parameters: ParameterCounts
    flops: FlopCount
    tokens: Tokens  # of a mean micro-batch
    largest_tokens: Tokens
    batch_size: int  # summed over all GPUs
    micro_batch: int  # images per GPU at once
    by_checkpointing: dict[str, Activations]  # for the largest masks drawn
    strategies: tuple[PlannedStrategy, ...]  # the chosen one first
    chosen: PlannedStrategy  # the one that the configuration would run
    reason: str  # for the choice
    advice: tuple[str, ...]  # empty if the configuration fits
    num_images: int
    images_source: str
    steps: int

    @property
    def days(self) -> float:
        """The days that the whole run takes with the chosen strategy, without evaluation and checkpoints."""
        return self.steps * self.chosen.time.step_s / 86400


def plan(
    config: PretrainConfig,
    cluster: Cluster,
    *,
    mfu: float | None = None,
    num_images: int | None = None,
    zero: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan of a run on a cluster.

    Args:
        config: the run's configuration.
        cluster: the GPUs and their links.
        mfu: share of the GPUs' peak that is reached while computing; None estimates it in bf16, see `roofline`.
        num_images: number of training images; None means those of ImageNet-1k, or of 22k if the configuration
            names it.
        zero: the checked section `zero_optimization` of the run's DeepSpeed file.

    Raises:
        ConfigError: the run is impossible: the batch doesn't divide, masks can't be drawn, or no strategy fits the
            states or a single image; the message states numbers and remedies.
    """
    images, source = training_images(config, num_images, mfu)
    batch_size, micro_batch = batches(config, cluster.num_gpus)
    mean, largest = usual_tokens(config.masks, config.model.grid, micro_batch=micro_batch, batch_size=batch_size)
    draws = draw_masks(config.masks, config.model.grid, batch_size=batch_size)
    counts = [mask_flops(config.model, draw.masks, num_images=draw.num_images) for draw in draws]
    parts = ("target", "context", "predictor")
    flops = FlopCount(**{part: sum(getattr(count, part) for count in counts) / len(counts) for part in parts})
    engine, reason = resolved(config, config.model, config.optimizer, cluster)
    spreads = possible_spreads(engine, cluster, config.optimizer, zero)
    if engine.target_precision == "fp8":
        _refuse_fp8(engine, cluster, spreads[0])
    given = FP32_MFU if mfu is None and engine.precision == "fp32" else mfu
    strategies = tuple(
        _planned(config, engine, cluster, spread, tokens=(mean, largest), flops=flops, mfu=given) for spread in spreads
    )

    def needed(spread: Spread, checkpointing: str, images: int, cuda_graphs: bool) -> Footprint:
        _, largest = usual_tokens(config.masks, config.model.grid, micro_batch=images, batch_size=batch_size)
        return footprint(config.model, largest, spread, checkpointing=checkpointing, cuda_graphs=cuda_graphs)

    refuse_impossible(config.model.name, cluster, strategies, needed)
    images, source, steps = _length(config, batch_size, (images, source))
    return Plan(
        config=config,
        compiled=engine.compile is True,
        cluster=cluster,
        mfu_source="given" if mfu is not None else "estimated" if given is None else "assumed",
        parameters=count_parameters(config.model),
        flops=flops,
        tokens=mean,
        largest_tokens=largest,
        batch_size=batch_size,
        micro_batch=micro_batch,
        by_checkpointing={
            mode: activations(
                config.model, largest, precision=engine.precision, checkpointing=mode, casts=spreads[0].autocast_copies
            )
            for mode in CHECKPOINTING
        },
        strategies=strategies,
        chosen=strategies[0],
        reason=reason,
        advice=tuple(advice(config.engine, cluster, strategies, needed, batch_size)),
        num_images=images,
        images_source=source,
        steps=steps,
    )


def batches(config: PretrainConfig | FinetuneConfig, num_gpus: int) -> tuple[int, int]:
    """Returns the number of images of all GPUs in one step, and of one GPU in one micro-batch."""
    data, unit = config.data, num_gpus * config.engine.accumulation
    batch = data.batch_size or (data.batch_size_per_process or 0) * num_gpus
    if batch % unit:
        near = max(unit, batch // unit * unit)
        raise ConfigError(
            f"batch {batch} is not divisible by {counted(num_gpus, 'GPU')} x accumulation "
            f"{config.engine.accumulation}; "
            f"try data.batch_size={near}"
        )
    return batch, batch // unit


def resolved(
    config: PretrainConfig | FinetuneConfig, model: ModelConfig, optimizer: OptimizerConfig, cluster: Cluster
) -> tuple[EngineConfig, str]:
    """Returns the engine that training would use on these GPUs, by the same rule as `auto`, and the reason."""
    if config.engine.device == "cpu":
        raise ConfigError(
            f"engine.device is cpu but --gpus names {cluster.num_gpus} {cluster.device.name}; set engine.device=auto "
            "or cuda"
        )
    engine, reason = resolve_engine(
        config.engine,
        model,
        world=cluster.num_gpus,
        processes_per_node=cluster.local_gpus,
        device="cuda",
        device_memory_bytes=cluster.device.memory_bytes,
        optimizer_states=optimizer.state_names,
    )
    if engine.strategy == "plain" and cluster.num_gpus > 1:
        raise ConfigError(
            f"engine.strategy is plain but --gpus names {cluster.num_gpus}; use auto, ddp, fsdp2 or deepspeed"
        )
    if cluster.num_gpus % engine.replicas:
        raise ConfigError(
            f"{counted(cluster.num_gpus, 'GPU')} don't split into engine.replicas {engine.replicas}; choose a divisor"
        )
    return resolve_compile(engine, device="cuda")[0], reason


def possible_spreads(
    engine: EngineConfig, cluster: Cluster, optimizer: OptimizerConfig, zero: Mapping[str, Any] | None
) -> list[Spread]:
    """Returns the ways to spread a step that the optimiser can run under, the configured one first.

    Raises:
        ConfigError: it can't run under the configured one.
    """
    buckets = ZeroBuckets() if zero is None else ZeroBuckets.of(zero)
    mine = _spread(engine, cluster, buckets, stage=3 if zero is None else int(zero["stage"]), optimizer=optimizer)
    if mine.stage and (refusal := optimizer.refusal(mine.stage)) is not None:
        raise ConfigError(refusal)
    return list(dict.fromkeys([mine, *_alternatives(engine, cluster, buckets, optimizer)]))


def _spread(
    engine: EngineConfig, cluster: Cluster, zero: ZeroBuckets, *, stage: int, optimizer: OptimizerConfig
) -> Spread:
    return Spread(
        strategy=f"zero{stage}" if engine.strategy == "deepspeed" else engine.strategy,
        world=cluster.num_gpus,
        local=cluster.local_gpus,
        replicas=engine.replicas,
        reshard_after_forward=engine.reshard_after_forward and engine.strategy == "fsdp2",
        precision=engine.precision,
        communication=engine.zero_communication,
        accumulation=engine.accumulation,
        optimizer_states=optimizer.state_names,
        renews_copies=optimizer.renews_copies,
        zero=zero if engine.strategy == "deepspeed" else ZeroBuckets(),
    )


def _refuse_fp8(engine: EngineConfig, cluster: Cluster, spread: Spread) -> None:
    """Refuses an fp8 target where training would."""
    reasons = {
        f"{cluster.device.name} has no fp8 products": not cluster.device.has_fp8,
        f"blocks aren't compiled (engine.compile is {str(engine.compile).lower()})": engine.compile is not True,
        f"{spread.label} shards the target and gathers it in bf16": not spread.target_replicated,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        raise ConfigError(f"engine.target_precision is fp8 but {reason}; set engine.target_precision=null")


def _alternatives(
    engine: EngineConfig, cluster: Cluster, zero: ZeroBuckets, optimizer: OptimizerConfig
) -> Iterator[Spread]:
    """Yields every other way to spread the step that the optimiser can run under."""
    changes: dict[str, Any] = {"strategy": "ddp", "replicas": 1, "ds_config": None, "zero_communication": "fp32"}
    base = _spread(engine.replace(**changes), cluster, zero, stage=1, optimizer=optimizer)
    if cluster.num_gpus == 1:
        return
    yield base
    replicas = [1, cluster.num_nodes] if cluster.num_nodes > 1 and cluster.local_gpus > 1 else [1]
    for reshard in (False, True):
        for groups in replicas:
            yield dataclasses.replace(base, strategy="fsdp2", replicas=groups, reshard_after_forward=reshard)
    for stage in (stage for stage in optimizer.zero_stages if optimizer.refusal(stage) is None):
        yield dataclasses.replace(base, strategy=f"zero{stage}", communication=engine.zero_communication)


def _planned(
    config: PretrainConfig,
    engine: EngineConfig,
    cluster: Cluster,
    spread: Spread,
    *,
    tokens: tuple[Tokens, Tokens],
    flops: FlopCount,
    mfu: float | None,
) -> PlannedStrategy:
    mean, largest = tokens
    checkpointing, graphs = engine.checkpointing, engine.cuda_graphs
    reached = (
        (mfu, mfu)
        if mfu is not None
        else estimate_mfu(
            config.model,
            cluster.device,
            spread,
            masks=config.masks,
            tokens=mean,
            flops=flops,
            compiled=engine.compile is True,
            fp8=engine.target_precision == "fp8" and spread.target_replicated,
            checkpointing=checkpointing,
        )
    )
    needed = footprint(config.model, largest, spread, checkpointing=checkpointing, cuda_graphs=graphs)
    timed = functools.partial(
        step_time, config.model, cluster, spread, flops=flops, micro_batch=mean.images, checkpointing=checkpointing
    )
    return PlannedStrategy(
        spread=spread,
        footprint=needed,
        fits=needed.fits(cluster.device),
        largest_micro_batch=largest_micro_batch(
            config.model,
            config.masks,
            spread,
            checkpointing=checkpointing,
            device=cluster.device,
            batch_size=round(mean.images) * spread.accumulation * spread.world,
            cuda_graphs=graphs,
        ),
        mfu=reached,
        time=timed(mfu=sum(reached) / 2),
        range_s=(timed(mfu=reached[1]).step_s, timed(mfu=reached[0]).step_s),
    )


def refuse_impossible(name: str, cluster: Cluster, strategies: tuple[PlannedStrategy, ...], needs: Needs) -> None:
    """Refuses a model that fits under no strategy, even with one image at a time and full checkpointing.

    Raises:
        ConfigError: it is one.
    """
    least = [(needs(each.spread, "full", 1, False), each.spread) for each in strategies]
    if any(needed.fits(cluster.device) for needed, _ in least):
        return
    room = usable_bytes(cluster.device) / 1e9
    where = f"of the {room:.1f} GB that tensors may take on one {cluster.device.name}"
    states, spread = min(((needed.states, spread) for needed, spread in least), key=lambda pair: pair[0])
    remedy = "use more GPUs, GPUs with more memory, or a smaller model.name"
    if states > usable_bytes(cluster.device):
        raise ConfigError(
            f"weights, gradients, optimiser and target of {name} take at least {states / 1e9:.1f} GB per "
            f"GPU ({spread.label} over {cluster.num_gpus}) {where}; {remedy}"
        )
    needed, spread = min(least, key=lambda pair: pair[0].peak)
    raise ConfigError(
        f"one image at a time with engine.checkpointing=full takes at least {needed.peak / 1e9:.1f} GB per GPU "
        f"({spread.label} over {cluster.num_gpus}, {needed.states / 1e9:.1f} GB for states) {where}; {remedy}, or a "
        "smaller model.image_size"
    )


def advice(
    engine: EngineConfig, cluster: Cluster, strategies: tuple[PlannedStrategy, ...], needs: Needs, batch_size: int
) -> Iterator[str]:
    """Yields changes that make the run fit; nothing if it fits as configured."""
    chosen = strategies[0]
    if chosen.fits:
        return
    share = batch_size // cluster.num_gpus
    fewest = share + 1  # micro-batches so far: slower checkpointing is only worth naming if it needs fewer
    for mode in CHECKPOINTING[CHECKPOINTING.index(engine.checkpointing) :]:
        for parts in (parts for parts in range(engine.accumulation, fewest) if share % parts == 0):
            if mode == engine.checkpointing and parts == engine.accumulation:
                continue
            spread = dataclasses.replace(chosen.spread, accumulation=parts)
            needed = needs(spread, mode, share // parts, engine.cuda_graphs)
            if needed.fits(cluster.device):
                changes = [f"engine.accumulation={parts}"] if parts != engine.accumulation else []
                changes += [f"engine.checkpointing={mode}"] if mode != engine.checkpointing else []
                cost = {"none": "", "selective": ", repeats cheap operations", "full": ", repeats the forward"}[mode]
                yield (
                    f"{' '.join(changes)}: {share // parts} images at a time, {needed.peak / 1e9:.1f} GB per GPU{cost}"
                )
                fewest = parts
                break
    for other in strategies[1:]:
        if other.fits:
            graph = engine.cuda_graphs and not other.spread.target_replicated
            without = ", with engine.cuda_graphs=false" if graph else ""
            peak = f"{other.footprint.peak / 1e9:.1f} GB per GPU as configured"
            yield f"or spread it as {other.spread.label}: {peak}{without}"
            return


def training_images(
    config: PretrainConfig | FinetuneConfig, num_images: int | None, mfu: float | None
) -> tuple[int, str]:
    """Returns the number of training images and its source, after checking what the flags say.

    Raises:
        ConfigError: a flag is out of its bounds.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu is {mfu:g}; give a share of the peak above 0 and at most 1, such as 0.4")
    if num_images is not None and num_images < 1:
        raise ConfigError(f"--images is {num_images}; give the number of training images, such as {IMAGENET_1K}")
    if num_images is not None:
        return num_images, "--images"
    if config.data.reader == "synthetic":
        return config.data.synthetic_samples, "data.synthetic_samples"
    if "22k" in f"{config.folder} {config.data.train}".lower():
        return IMAGENET_22K, "ImageNet-22k, from the configuration's name; --images changes it"
    return IMAGENET_1K, "ImageNet-1k; --images changes it"


def _length(config: PretrainConfig, batch_size: int, found: tuple[int, str]) -> tuple[int, str, int]:
    """Returns the number of training images, its source, and the steps of the whole run."""
    images, source = found
    if source == "--images" and config.schedule.steps_per_epoch:
        raise ConfigError(
            f"--images is {images} but schedule.steps_per_epoch is {config.schedule.steps_per_epoch}, which "
            "defines an epoch; drop --images, or set schedule.steps_per_epoch=null"
        )
    per_epoch = config.schedule.steps_per_epoch or images // batch_size
    if config.schedule.steps_per_epoch:
        images, source = per_epoch * batch_size, "schedule.steps_per_epoch x batch"
    if not per_epoch:
        raise ConfigError(f"batch {batch_size} is larger than the {images} training images; lower data.batch_size")
    steps = int(config.schedule.epochs * per_epoch)
    stop = config.schedule.stop_after
    return images, source, steps if stop is None else min(stop, steps)

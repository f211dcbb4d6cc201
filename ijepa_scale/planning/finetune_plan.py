"""Plans a finetuning run: memory, FLOPs and time of the classifier, from formulas. `plan` does it for pretraining."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ijepa_scale.config.architectures import Architecture, resolve
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.activations import (
    BF16_BYTES,
    NORM_STATISTICS,
    Activations,
    backward_work,
    block_bytes,
    forward_work,
)
from ijepa_scale.planning.communication import buffers_of, transfers_of
from ijepa_scale.planning.devices import Cluster
from ijepa_scale.planning.flops import FlopCount, finetune_flops
from ijepa_scale.planning.footprint import Footprint, footprint_of, image_bytes, largest_that
from ijepa_scale.planning.memory import FP32_BYTES, spread_states
from ijepa_scale.planning.parameters import ParameterCounts, block_parameters, count_parameters
from ijepa_scale.planning.plan import (
    CHECKPOINTING,
    FP32_MFU,
    Plan,
    PlannedStrategy,
    advice,
    batches,
    plan,
    possible_spreads,
    refuse_impossible,
    resolved,
    training_images,
)
from ijepa_scale.planning.roofline import estimate_finetune_mfu
from ijepa_scale.planning.spread import Spread
from ijepa_scale.planning.step_time import time_of
from ijepa_scale.planning.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ClassifierCounts:
    """Numbers of a classifier's parameters."""

    encoder: int  # trained, its last norm or the one after the pooling included
    head: int
    frozen: int
    averaged: int  # a second copy of all, if weights are averaged

    @property
    def trained(self) -> int:
        """The number of parameters that the optimiser updates."""
        return self.encoder + self.head


def count_classifier(config: FinetuneConfig) -> ClassifierCounts:
    """Returns the parameter counts of the classifier that the configuration describes.

    Raises:
        ConfigError: more blocks are frozen than there are, or sizes don't divide.
    """
    model, sizes = config.model, resolve(config.model.pretrained)
    if model.frozen_blocks > sizes.depth:
        raise ConfigError(
            f"model.frozen_blocks is {model.frozen_blocks} of {sizes.depth} blocks; give at most {sizes.depth}"
        )
    whole = count_parameters(model.pretrained).encoder
    head = (model.num_layers * sizes.width + 1) * model.num_classes
    frozen = 0
    if model.frozen_blocks:
        patches = (sizes.channels * sizes.patch_size**2 + 1) * sizes.width
        frozen = patches + model.frozen_blocks * block_parameters(sizes.width, sizes.mlp_width)
    averaged = 0 if config.optimizer.ema is None else whole + head
    return ClassifierCounts(encoder=whole - frozen, head=head, frozen=frozen, averaged=averaged)


def classifier_activations(
    config: FinetuneConfig, images: float, *, checkpointing: str, precision: str, casts: bool
) -> Activations:
    """Returns the bytes of one micro-batch of `images` under eager PyTorch; the arguments are as in `activations`."""
    model, sizes = config.model, resolve(config.model.pretrained)
    e = BF16_BYTES if precision == "bf16" else FP32_BYTES
    tokens, wide = images * sizes.num_patches, (sizes.width, sizes.mlp_width)
    trained = sizes.depth - model.frozen_blocks
    block = block_bytes(tokens, *wide, heads=sizes.heads, e=e)
    embedded = 0.0 if model.frozen_blocks else e * tokens * sizes.channels * sizes.patch_size**2
    tail = 0.0  # the encoder's norm: its statistics, and the last block's output
    if model.pool_norm == "before":
        tail = tokens * (model.num_layers * NORM_STATISTICS + FP32_BYTES * sizes.width)
    tail += images * model.num_layers * sizes.width * (FP32_BYTES + e)
    logits = images * model.num_classes
    copied = BF16_BYTES if precision == "bf16" and casts else 0
    inside = trained * (4 * sizes.width**2 + 2 * sizes.width * sizes.mlp_width)  # frozen weights' copies aren't held
    outside = model.num_layers * sizes.width * model.num_classes
    return Activations(
        inputs=image_bytes(model.pretrained, images),
        encoder=embedded + trained * block.kept(checkpointing) + tail,
        encoder_tail=tail,
        predictor=0.0,
        predictor_tail=0.0,
        loss=3 * FP32_BYTES * logits,
        loss_work=FP32_BYTES * logits,
        weight_casts=copied * (inside + outside),
        kept_casts=copied * (outside + (inside if checkpointing == "none" else 0)),
        encoder_block=block.recomputed(checkpointing) + backward_work(tokens, *wide, e=e),
        predictor_block=0.0,
        encoder_work=forward_work(tokens, *wide, e=e, checkpointing=checkpointing),
        predictor_work=0.0,
        target_work=0.0,
    )


def classifier_footprint(config: FinetuneConfig, spread: Spread, checkpointing: str, images: float) -> Footprint:
    """Returns the bytes of one process that finetunes with micro-batches of `images`.

    Frozen and averaged parameters are counted as `target`: both have neither gradients nor an optimiser's states.
    """
    counts, sizes = count_classifier(config), resolve(config.model.pretrained)
    # what stays gathered counts as a buffer
    states = spread_states(counts.trained, counts.frozen + counts.averaged, replace(spread, reshard_after_forward=True))
    if spread.lasting_copies:
        states = replace(states, weights=states.weights + BF16_BYTES * counts.trained)
    return footprint_of(
        states,
        classifier_activations(
            config, images, checkpointing=checkpointing, precision=spread.precision, casts=spread.autocast_copies
        ),
        buffers_of(counts.trained, block_parameters(sizes.width, sizes.mlp_width), spread),
        spread,
        images=image_bytes(config.model.pretrained, images),
    )


def plan_run(config: PretrainConfig | FinetuneConfig, cluster: Cluster, **options: Any) -> Plan:
    """Returns the plan of a run of either kind; the arguments are those of `plan.plan`.

    Raises:
        ConfigError: the run is impossible.
    """
    if isinstance(config, PretrainConfig):
        return plan(config, cluster, **options)
    return plan_finetuning(config, cluster, **options)


def plan_finetuning(
    config: FinetuneConfig,
    cluster: Cluster,
    *,
    mfu: float | None = None,
    num_images: int | None = None,
    zero: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the plan of a finetuning run on a cluster; the arguments are those of `plan.plan`.

    Raises:
        ConfigError: the run is impossible; the message states numbers and remedies.
    """
    images, source = training_images(config, num_images, mfu)
    batch_size, micro_batch = batches(config, cluster.num_gpus)
    model = config.model.pretrained
    optimizer = config.optimizer.adamw(batch_size)
    engine, reason = resolved(config, model, optimizer, cluster)
    counts, sizes = count_classifier(config), resolve(model)
    spreads = possible_spreads(engine, cluster, optimizer, zero)
    head = 6 * config.model.num_layers * sizes.width * config.model.num_classes
    flops = FlopCount(
        target=0.0, context=finetune_flops(model, frozen_blocks=config.model.frozen_blocks) + head, predictor=0.0
    )
    given = FP32_MFU if mfu is None and engine.precision == "fp32" else mfu
    strategies = tuple(
        _planned(
            config, cluster, spread, micro_batch=micro_batch, batch_size=batch_size, flops=flops, mfu=given,
            compiled=engine.compile is True,
        )
        for spread in spreads
    )  # fmt: skip

    def needed(spread: Spread, checkpointing: str, size: int, cuda_graphs: bool) -> Footprint:
        return classifier_footprint(config, spread, checkpointing, size)

    refuse_impossible(model.name, cluster, strategies, needed)
    steps_per_epoch = images // batch_size
    if not steps_per_epoch:
        raise ConfigError(f"batch {batch_size} is larger than the {images} training images; lower data.batch_size")
    steps, stop = int(config.schedule.epochs * steps_per_epoch), config.schedule.stop_after
    tokens = _tokens(sizes, micro_batch)
    return Plan(
        config=config,
        compiled=engine.compile is True,
        cluster=cluster,
        mfu_source="given" if mfu is not None else "estimated" if given is None else "assumed",
        parameters=ParameterCounts(encoder=counts.trained, encoder_positions=0, predictor=0, predictor_positions=0),
        flops=flops,
        tokens=tokens,
        largest_tokens=tokens,
        batch_size=batch_size,
        micro_batch=micro_batch,
        by_checkpointing={
            mode: classifier_activations(
                config,
                micro_batch,
                checkpointing=mode,
                precision=engine.precision,
                casts=spreads[0].autocast_copies,
            )
            for mode in CHECKPOINTING
        },
        strategies=strategies,
        chosen=strategies[0],
        reason=reason,
        advice=tuple(advice(config.engine, cluster, strategies, needed, batch_size)),
        num_images=images,
        images_source=source,
        steps=steps if stop is None else min(stop, steps),
    )


def _planned(
    config: FinetuneConfig,
    cluster: Cluster,
    spread: Spread,
    *,
    micro_batch: int,
    batch_size: int,
    flops: FlopCount,
    mfu: float | None,
    compiled: bool,
) -> PlannedStrategy:
    checkpointing, counts = config.engine.checkpointing, count_classifier(config)
    reached = (
        (mfu, mfu)
        if mfu is not None
        else estimate_finetune_mfu(
            config.model,
            cluster.device,
            spread,
            images=micro_batch,
            flops=flops,
            compiled=compiled,
            checkpointing=checkpointing,
            parameters=(counts.trained, counts.averaged),
        )
    )
    need = functools.partial(classifier_footprint, config, spread, checkpointing)
    needed = need(micro_batch)
    moved = transfers_of(counts.trained, 0, spread)
    timed = functools.partial(
        time_of, moved, cluster, spread, flops=flops, micro_batch=micro_batch, checkpointing=checkpointing
    )
    return PlannedStrategy(
        spread=spread,
        footprint=needed,
        fits=needed.fits(cluster.device),
        largest_micro_batch=largest_that(
            lambda size: need(size).fits(cluster.device), max(1, batch_size // spread.world)
        ),
        mfu=reached,
        time=timed(mfu=sum(reached) / 2),
        range_s=(timed(mfu=reached[1]).step_s, timed(mfu=reached[0]).step_s),
    )


def _tokens(sizes: Architecture, images: int) -> Tokens:
    return Tokens(
        images=images,
        patches=sizes.num_patches,
        context=images * sizes.num_patches,
        predicted=0.0,
        predictor=0.0,
        wanted=0.0,
        packed=False,
    )

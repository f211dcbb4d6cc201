"""Formats a plan as text for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.planning.communication import LINK_SHARE
from ijepa_scale.planning.cost import cost_lines, gpu_hours
from ijepa_scale.planning.footprint import USABLE_SHARE, usable_bytes
from ijepa_scale.planning.plan import Plan, PlannedStrategy
from ijepa_scale.planning.tokens import STEPS
from ijepa_scale.plurals import counted

WIDTH = 110


def plan_text(plan: Plan) -> str:
    """Returns the plan for a terminal, at most 110 columns wide."""
    parts = (
        _head(plan),
        _memory(plan),
        _activations(plan),
        _strategies(plan),
        _wire(plan),
        _time(plan),
        _verdict(plan),
    )
    return "\n\n".join("\n".join(map(_wrapped, part)) for part in parts)


def _wrapped(line: str) -> str:
    """Wraps a line that is too wide; continuation lines are indented to its second column."""
    if len(line) <= WIDTH:
        return line
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * 11, replace_whitespace=False)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain values: bytes, FLOPs, seconds; without `config`."""
    fields = {field.name for field in dataclasses.fields(plan)} - {"config", "strategies", "chosen"}
    values = {name: _plain(getattr(plan, name)) for name in sorted(fields)}
    return {
        **values,
        "days": plan.days,
        "gpu_hours": gpu_hours(plan, plan.chosen.time.step_s),
        "gpu_hours_range": [gpu_hours(plan, step_s) for step_s in plan.chosen.range_s],
        "chosen": _strategy_values(plan.chosen),
        "candidates": [_strategy_values(each) for each in plan.strategies],
    }


def _strategy_values(each: PlannedStrategy) -> dict[str, Any]:
    values = _plain(each)
    values["label"] = each.spread.label
    values["time"] |= {
        "step_s": each.time.step_s, "images_per_s": each.time.images_per_s, "wire_bytes": each.time.wire_bytes
    }  # fmt: skip
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 9.95e9 else f"{value / 1e9:.1f}"


def _head(plan: Plan) -> Iterator[str]:
    config, device, cluster = plan.config, plan.cluster.device, plan.cluster
    model = config.model if isinstance(config, PretrainConfig) else config.model.encoder
    nodes = f" in {counted(cluster.num_nodes, 'node')}" if cluster.num_nodes > 1 else ""
    height, width = model.image_size
    trained = f"{plan.parameters.trainable / 1e6:.1f} M trained"
    if isinstance(config, PretrainConfig):
        parts = (
            f"{trained} (encoder {plan.parameters.encoder / 1e6:.1f}, predictor "
            f"{plan.parameters.predictor / 1e6:.1f}), target {plan.parameters.target / 1e6:.1f} M"
        )
    else:
        frozen = f", first {counted(config.model.frozen_blocks, 'block')} frozen" if config.model.frozen_blocks else ""
        averaged = "" if config.optimizer.ema is None else ", averaged weights kept"
        parts = f"classifier of {config.model.num_classes} classes, {trained}{frozen}{averaged}"
    yield f"model      {model.name}/{model.patch_size} at {height}x{width}: {parts}"
    yield (
        f"GPUs       {cluster.num_gpus} x {device.name}{nodes}: {device.memory_bytes / 1e9:.0f} GB, "
        f"{device.peak_flops / 1e12:.0f} TFLOP/s dense bf16, links {device.link_bandwidth / 1e9:.0f} GB/s"
        + (_network(plan) if cluster.num_nodes > 1 else "")
    )
    yield (
        f"batch      {counted(plan.batch_size, 'image')} = {counted(cluster.num_gpus, 'GPU')} x "
        f"accumulation {config.engine.accumulation} x "
        f"{plan.micro_batch}"
    )
    yield from _flops(plan)


def _flops(plan: Plan) -> Iterator[str]:
    config, tokens = plan.config, plan.tokens
    if not isinstance(config, PretrainConfig):
        yield (
            f"FLOPs      {plan.flops.total / 1e9:.0f} G per image of {tokens.patches} tokens, all of them encoded; "
            "without recomputation"
        )
        return
    share = plan.micro_batch * config.masks.num_target_blocks * config.masks.num_context_blocks
    yield (
        f"masks      {config.masks.sampler}, {config.masks.context}: {tokens.context / tokens.images:.0f} "
        f"context tokens of {tokens.patches} per image, {tokens.predicted / share:.0f} per target "
        f"(mean of {STEPS} drawn steps)"
    )
    yield (
        f"FLOPs      {plan.flops.total / 1e9:.0f} G per image, nominal (whole last blocks, as in published "
        f"figures): target {plan.flops.target / 1e9:.0f}, context {plan.flops.context / 1e9:.0f}, predictor "
        f"{plan.flops.predictor / 1e9:.0f}; without recomputation"
    )


def _network(plan: Plan) -> str:
    bandwidth = plan.cluster.network_bandwidth
    usual = bandwidth == plan.cluster.device.network_bandwidth
    source = " (typical for it; --network changes it)" if usual else ""
    return f", network {bandwidth / 1e9:g} GB/s per GPU{source}"


def _memory(plan: Plan) -> Iterator[str]:
    chosen, engine = plan.chosen, plan.config.engine
    needed = chosen.footprint
    yield (
        f"memory     GB per GPU, {chosen.spread.label}, {engine.precision}, checkpointing {engine.checkpointing}, "
        + ("largest masks drawn" if isinstance(plan.config, PretrainConfig) else "target: frozen or averaged weights")
    )
    kinds = ("weights", "gradients", "optimizer", "target", "activations", "buffers")
    yield "           " + "".join(f"{kind:>13}" for kind in (*kinds, "peak"))
    yield "           " + "".join(f"{_gb(getattr(needed, kind)):>13}" for kind in (*kinds, "peak"))
    yield (
        f"           the peak, at the {needed.moment}, isn't the sum: activations are freed while gradients grow; "
        f"tensors may take {usable_bytes(plan.cluster.device) / 1e9:.1f} GB"
    )


def _activations(plan: Plan) -> Iterator[str]:
    yield f"kept       GB kept for backward of {plan.micro_batch} images, by engine.checkpointing"
    for mode, each in plan.by_checkpointing.items():
        mark = " <- configured" if mode == plan.config.engine.checkpointing else ""
        yield (
            f"           {mode:<10}{_gb(each.kept):>7}: encoder {_gb(each.encoder)}, predictor {_gb(each.predictor)}, "
            f"loss {_gb(each.loss)}, bf16 weights {_gb(each.kept_casts)}{mark}"
        )
    if plan.compiled:
        yield "           (figures for eager mode: compiled blocks keep less, so these are upper bounds)"


def _strategies(plan: Plan) -> Iterator[str]:
    titles = f"{'states GB':>10}{'peak GB':>9}{'fits':>6}{'most images':>13}{'wire GB':>9}{'images/s':>10}"
    yield f"strategies {'':<18}{titles}"
    for each in plan.strategies:
        mark = " <- configured" if each is plan.chosen else ""
        yield (
            f"           {each.spread.label:<18}{_gb(each.footprint.states):>10}{_gb(each.footprint.peak):>9}"
            f"{'yes' if each.fits else 'no':>6}{each.largest_micro_batch:>13}{_gb(each.time.wire_bytes):>9}"
            f"{each.time.images_per_s:>10.0f}{mark}"
        )
    yield (
        f"           most images: the most that fit on a GPU at once with checkpointing "
        f"{plan.config.engine.checkpointing}, up to its share of the batch"
    )


def _wire(plan: Plan) -> Iterator[str]:
    time = plan.chosen.time
    if not time.transfers:
        yield "wire       nothing: one process"
        return
    yield (
        f"wire       {_gb(time.wire_bytes)} GB per GPU and step: {1e3 * time.communication_s:.0f} ms, next to "
        f"{1e3 * time.compute_s:.0f} ms of computation; {1e3 * time.exposed_s:.0f} ms aren't hidden"
    )
    for each in time.transfers:
        hidden = "can't overlap" if each.behind == "nothing" else f"hidden behind the {each.behind}"
        yield (
            f"           {each.purpose:<26}{_gb(each.bytes):>7} GB{1e3 * each.seconds(plan.cluster):>8.1f} ms, "
            f"among {counted(each.processes, 'GPU')}, {hidden}"
        )


def _time(plan: Plan) -> Iterator[str]:
    time = plan.chosen.time
    yield (
        f"time       {time.images_per_s:.0f} images/s ({time.images_per_s / plan.cluster.num_gpus:.0f} per GPU), "
        f"{1e3 * time.step_s:.0f} ms per step, computing at {_mfu(plan)}"
    )
    yield (
        f"           {counted(plan.steps, 'step')} = {plan.steps * plan.batch_size / plan.num_images:.4g} epochs of "
        f"{plan.num_images:,} images ({plan.images_source}): {plan.days:.2f} days"
    )
    yield from cost_lines(plan)
    if plan.config.engine.precision == "fp32":
        yield "           engine.precision is fp32, for which no peak is known, so a step takes longer than this"
    yield (
        f"           assumed: collectives reach {LINK_SHARE:.0%} of a link, tensors {USABLE_SHARE:.0%} of the memory; "
        "loading, evaluation and checkpoints take no time"
    )


def _mfu(plan: Plan) -> str:
    low, high = plan.chosen.mfu
    middle = f"{(low + high) / 2:.0%} of the peak"
    if plan.mfu_source == "estimated":
        blocks = "compiled" if plan.compiled else "eager"
        return f"{middle} ({low:.0%} to {high:.0%}, estimated for {blocks} blocks, not measured; --mfu replaces it)"
    return f"{middle} ({'from --mfu' if plan.mfu_source == 'given' else 'assumed'}, not measured)"


def _verdict(plan: Plan) -> Iterator[str]:
    chosen = plan.chosen
    yield f"advice     {chosen.spread.label}: {plan.reason}"
    if chosen.fits:
        yield f"           it fits as configured: {_gb(chosen.footprint.peak)} GB per GPU"
        return
    yield (
        f"           it doesn't fit as configured: {_gb(chosen.footprint.peak)} GB per GPU of "
        f"{_gb(usable_bytes(plan.cluster.device))}; any of these changes is enough"
    )
    yield from (f"           {line}" for line in plan.advice)

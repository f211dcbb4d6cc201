"""Compares predicted with counted bytes: those kept by autograd, the peak of a step, the numbers of tokens."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, ModelConfig, RegressionConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.low_copies import use_low_copies
from ijepa_scale.engine.parallelize import _KEPT_OPERATIONS, checkpoint_blocks
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import MaskSampler, Wanted
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.objectives.regression import Regression
from ijepa_scale.objectives.targets import normalise_targets, select_targets
from ijepa_scale.planning.activations import activations
from ijepa_scale.planning.devices import find_device
from ijepa_scale.planning.footprint import (
    footprint,
    largest_micro_batch,
    target_copy_bytes,
    usable_bytes,
    usual_tokens,
    weight_copy_bytes,
)
from ijepa_scale.planning.spread import Spread, ZeroBuckets
from ijepa_scale.planning.tokens import draw_masks, mean_tokens, micro_batches
from ijepa_scale.train.step import TrainStep
from tests.distributed.training import SCHEDULE
from tests.unit.planning.count_bytes import LiveBytes, saved_bytes

MODEL = ModelConfig(
    name="vit_tiny", image_size=96, patch_size=8, width=96, depth=4, heads=3, predictor_width=48, predictor_depth=3
)
BATCH = 4
CASES = [
    (context, precision, mode)
    for context in ("truncate", "packed")
    for precision in ("fp32", "bf16")
    for mode in ("none", "full", "selective")
]


class Step:
    """The forward of one training step on the CPU, with its masks."""

    def __init__(self, context: str, precision: str, checkpointing: str) -> None:
        self.masks_config = BlockMaskConfig(context=context, group_size=BATCH)
        self.module = build_jepa(MODEL, seed=0)
        self.target = build_target(self.module)
        checkpoint_blocks(self.module, checkpointing)
        self.masks = MaskSampler(self.masks_config, MODEL.grid, seed=0)(0, 0, BATCH, BATCH)
        self.wanted = Wanted.of(self.masks, BATCH, 144)
        self.images = torch.zeros(BATCH, 3, 96, 96)
        self.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
        draws = draw_masks(self.masks_config, MODEL.grid, batch_size=BATCH)
        self.tokens = micro_batches(self.masks_config, draws, MODEL.grid, BATCH)[0]

    @property
    def existing(self) -> list[Tensor]:
        """The tensors that are allocated before the step."""
        parts: list[nn.Module] = [self.module, self.target]
        return [self.images, *(tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))]

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, and the tensors that a training step still holds then: features and prediction."""
        with torch.no_grad(), self.autocast():
            features = self.target(self.images, wanted=self.wanted.patches)
        features = normalise_targets(features)
        with self.autocast():
            prediction = self.module(self.images, self.masks)
        target = select_targets(features, self.wanted.rows, self.masks)
        return Regression(RegressionConfig()).compare(prediction, target, self.masks), features, prediction


@pytest.mark.parametrize(("context", "precision", "mode"), CASES)
def test_kept_bytes_are_what_autograd_keeps(context: str, precision: str, mode: str) -> None:
    step = Step(context, precision, mode)
    predicted = activations(MODEL, step.tokens, precision=precision, checkpointing=mode, device="cpu")
    if mode == "none":
        counted, _ = saved_bytes(step, without=step.existing)
        assert predicted.kept == pytest.approx(counted, rel=0.01)  # ignores small tensors: indices, weights of rows
    with LiveBytes(step.existing) as live:
        held = step()
    images = step.images.nbytes
    assert held[0].isfinite()
    assert predicted.kept + predicted.inputs - images == pytest.approx(live.live, rel=0.05)


@pytest.mark.parametrize(("context", "precision", "mode"), CASES)
def test_the_peak_is_that_of_a_step(context: str, precision: str, mode: str) -> None:
    step = Step(context, precision, mode)
    with LiveBytes(step.existing) as live:
        held = step()
        held[0].backward()
    found = footprint(
        MODEL, step.tokens, Spread(strategy="plain", precision=precision), checkpointing=mode, device="cpu"
    )
    existing = found.weights + found.optimizer + found.target + step.images.nbytes
    assert found.peak - existing == pytest.approx(live.peak, rel=0.1)


def test_fsdp2_makes_no_bf16_copies_of_weights() -> None:
    step = Step("truncate", "bf16", "none")
    copies = activations(MODEL, step.tokens)
    without = activations(MODEL, step.tokens, casts=False)
    blocks = 4 * 12 * 96**2 + 3 * 12 * 48**2 + 2 * 96 * 48
    assert copies.kept - without.kept == 2 * blocks == copies.kept_casts and without.weight_casts == 0


def test_the_fused_tails_copies_of_weights_last_and_replace_autocasts() -> None:
    tokens = Step("truncate", "bf16", "none").tokens
    held = sum(2 * value.numel() for value in use_low_copies(build_jepa(MODEL, seed=0)).values())
    ddp, fused = (Spread(strategy="ddp", world=2, renews_copies=renews) for renews in (False, True))
    assert weight_copy_bytes(MODEL, ddp) == 0 and weight_copy_bytes(MODEL, fused) == held
    plain, more = (footprint(MODEL, tokens, spread) for spread in (ddp, fused))
    assert more.weights - plain.weights == held
    assert plain.activations - more.activations == activations(MODEL, tokens).kept_casts
    sharded = Spread(strategy="fsdp2", world=2, renews_copies=True)
    assert weight_copy_bytes(MODEL, sharded) == 0 == activations(MODEL, tokens, casts=fused.autocast_copies).kept_casts


def test_selective_checkpointing_keeps_varlen_attention_as_it_keeps_the_runs() -> None:
    """The bytes for runs are counted above; CUDA's kernel doesn't run here, so check the list of kept operations."""
    varlen, dense = torch.ops.torch_attn._varlen_attn, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    assert varlen.default in _KEPT_OPERATIONS and dense.default in _KEPT_OPERATIONS
    tokens = Step("packed", "bf16", "none").tokens
    cuda, cpu = (activations(MODEL, tokens, checkpointing="selective", device=kind) for kind in ("cuda", "cpu"))
    assert (cuda.encoder, cuda.predictor) == (cpu.encoder, cpu.predictor)
    copied = 2 * tokens.context * 96  # the concatenated outputs of runs
    assert cpu.encoder_block - cuda.encoder_block == pytest.approx(copied)
    whole = [activations(MODEL, tokens, device=kind).encoder for kind in ("cuda", "cpu")]
    assert whole[1] - whole[0] == pytest.approx(4 * copied)


@pytest.mark.parametrize("context", ["truncate", "packed"])
def test_tokens_are_those_of_the_masks(context: str) -> None:
    config = BlockMaskConfig(context=context, group_size=8, num_context_blocks=2)
    draws = draw_masks(config, (12, 12), batch_size=32)
    parts = micro_batches(config, draws, (12, 12), 4)
    first = MaskSampler(config, (12, 12), seed=0)(0, 0, 4, 32)
    kept = 8 * first.context.shape[2] if context == "truncate" else first.context_layout.total
    rows = first.targets.numel() * 2 if context == "truncate" else len(first.target_rows)
    assert (parts[0].context, parts[0].predicted, parts[0].predictor) == (kept, rows, 4 * kept + rows)
    assert parts[0].wanted == Wanted.of(first, 4, 144).patches.shape[1]
    assert parts[0].packed == (context == "packed")
    mean = mean_tokens(parts)
    assert min(p.context for p in parts) <= mean.context <= max(p.context for p in parts)
    large = micro_batches(config, draws, (12, 12), 64)[0]  # more than were drawn: scaled up, and packed across groups
    assert large.context == pytest.approx(2 * sum(p.context for p in parts[:8])) and large.packed


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    model, masks, device = ModelConfig(name="vit_large"), BlockMaskConfig(), find_device("rtx-4090")
    spread = Spread(strategy="ddp", world=8)
    size = largest_micro_batch(model, masks, spread, checkpointing="none", device=device, batch_size=2048)
    assert 1 < size < 256

    def fits(images: int) -> bool:
        _, most = usual_tokens(masks, model.grid, micro_batch=images, batch_size=2048)
        return footprint(model, most, spread).fits(device)

    assert fits(size) and not fits(size + 1)
    full = largest_micro_batch(model, masks, spread, checkpointing="full", device=device, batch_size=2048)
    assert full > size
    giant = ModelConfig(name="vit_giant")
    assert largest_micro_batch(giant, masks, spread, checkpointing="full", device=device, batch_size=2048) == 0
    assert usable_bytes(device) == pytest.approx(0.92 * 24e9)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_states_and_buffers_shrink_as_strategies_promise(strategy: str) -> None:
    step = Step("truncate", "bf16", "none")
    spread = Spread(strategy=strategy, world=4, zero=ZeroBuckets(reduce=1000, held=0, prefetch=0))
    found = footprint(MODEL, step.tokens, spread)
    alone = footprint(MODEL, step.tokens, Spread(strategy="plain"))
    sharded = {"ddp": set(), "zero1": {"optimizer"}, "zero2": {"optimizer", "gradients"}}
    for kind in ("weights", "gradients", "optimizer", "target"):
        shard = kind in sharded.get(strategy, {"weights", "gradients", "optimizer", "target"})
        moments = 1.5 if kind == "optimizer" and strategy.startswith("zero") else 1.0  # ZeRO adds a master copy
        whole = getattr(alone, kind) - (target_copy_bytes(MODEL, Spread(strategy="plain")) if kind == "target" else 0)
        copies = target_copy_bytes(MODEL, spread) if kind == "target" else 0
        assert getattr(found, kind) == pytest.approx(whole * moments / (4 if shard else 1) + copies), kind
    assert (found.buffers > 0) == (strategy != "ddp")


@pytest.mark.parametrize(("strategy", "replicated"), [("ddp", True), ("zero2", True), ("fsdp2", False)])
def test_the_pool_of_a_graph_is_always_counted(strategy: str, replicated: bool) -> None:
    tokens, spread = Step("truncate", "bf16", "none").tokens, Spread(strategy=strategy, world=4)
    without, graphed = (footprint(MODEL, tokens, spread, cuda_graphs=graphs) for graphs in (False, True))
    pool = activations(MODEL, tokens).target_work + BATCH * 3 * 96 * 96 * 4 if replicated else 0.0
    assert graphed.peak - without.peak == pytest.approx(pool) == graphed.buffers - without.buffers


def test_accumulation_keeps_gradients() -> None:
    tokens = Step("truncate", "bf16", "none").tokens
    once, twice = (footprint(MODEL, tokens, Spread(strategy="plain", accumulation=n)) for n in (1, 2))
    assert twice.peak - once.peak == pytest.approx(once.gradients, rel=0.01) and once.moment == "loss"
    sharded = [footprint(MODEL, tokens, Spread(strategy="fsdp2", world=4, accumulation=n)).gradients for n in (1, 2)]
    assert sharded[1] == pytest.approx(5 * sharded[0])  # whole fp32 gradients until the last micro-batch


def test_impossible_masks_are_refused() -> None:
    with pytest.raises(ConfigError, match="masks.min_keep is 200, but target blocks on a grid of 14x14 patches"):
        usual_tokens(BlockMaskConfig(min_keep=200), (14, 14), micro_batch=1, batch_size=8)


def test_bad_spreads_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy is 'zero4'; choose one of plain, ddp"):
        Spread(strategy="zero4")
    with pytest.raises(ValueError, match="8 processes don't split into replicas 3; choose a divisor"):
        Spread(strategy="fsdp2", world=8, replicas=3)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_the_peak_is_that_of_a_whole_training_step(mode: str) -> None:
    """Includes optimiser, target update and meters, under the engine: the CPU version of the test on a GPU."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    engine = build_engine(world, EngineConfig(strategy="plain", checkpointing=mode), AdamWConfig())
    module = build_jepa(MODEL, seed=0)
    engine.prepare(module, build_target(module))
    masks = BlockMaskConfig(group_size=BATCH)
    step = TrainStep(
        engine,
        augment=lambda micro: torch.zeros(len(micro), 3, 96, 96),
        masks=MaskSampler(masks, MODEL.grid, seed=0),
        schedule=SCHEDULE,
        objective=build_objective(RegressionConfig()),
        batch_size=BATCH,
        meters=Meters(world.device),
    )
    nothing, labels = torch.zeros(BATCH, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.int64)

    def batch(number: int) -> Batch:
        sizes, ids = np.ones((BATCH, 2), int), np.arange(BATCH)
        return Batch(pixels=nothing, sizes=sizes, sample_ids=ids, labels=labels, step=number, epoch=0, position=0)

    step(batch(0))  # allocates the optimiser's states
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    existing = [*module.parameters(), *engine.target_module.parameters(), *engine._local_shards()[0], *moments]
    with LiveBytes(existing) as live:
        step(batch(1))
    tokens = micro_batches(masks, draw_masks(masks, MODEL.grid, batch_size=BATCH)[1:2], MODEL.grid, BATCH)[0]
    found = footprint(MODEL, tokens, Spread(strategy="plain"), checkpointing=mode, device="cpu")
    moving = found.peak - found.weights - found.optimizer - found.target
    assert moving == pytest.approx(live.peak, rel=0.1), found.moment

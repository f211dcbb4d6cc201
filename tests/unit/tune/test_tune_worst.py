"""The longest masks: no draw exceeds them, and masks of these lengths are valid."""

from __future__ import annotations

import itertools

import pytest

from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MaskSampler, PackedMasks, Wanted
from ijepa_scale.tune.worst import (
    Lengths,
    ProbeMasks,
    longest,
    longest_drawn,
    worst_masks,
    worst_tokens,
)

GRIDS = [(8, 8), (6, 9), (14, 14)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sampler", ["multiblock", "reference"])
@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlap"])
@pytest.mark.parametrize("scale", [(0.15, 0.2), (0.3, 0.5)], ids=["small", "large"])
def test_no_draw_exceeds_the_bound(grid: tuple, sampler: str, overlap: bool, scale: tuple) -> None:
    config = BlockMaskConfig(
        sampler=sampler, context="packed", min_keep=2, allow_overlap=overlap, group_size=4, target_scale=scale
    )
    bound, draw = MaskSampler(config, grid, seed=0).longest(), MaskSampler(config, grid, seed=1)
    for step in range(60):
        masks = draw(step, 0, 16, 16)
        assert isinstance(masks, PackedMasks)
        assert masks.context_layout.longest <= bound.context <= grid[0] * grid[1]
        assert masks.target_layout.longest <= bound.target


@pytest.mark.parametrize("sampler", ["multiblock", "reference"])
def test_the_bound_is_reached_with_one_target(sampler: str) -> None:
    config = BlockMaskConfig(
        sampler=sampler, context="packed", min_keep=0, num_target_blocks=1, group_size=1, context_scale=(0.85, 0.85)
    )
    draw = MaskSampler(config, (6, 6), seed=0)
    lengths = [draw(step, 0, 1, 1).context_layout.longest for step in range(400)]
    assert max(lengths) == MaskSampler(config, (6, 6), seed=0).longest().context


def test_drawn_lengths_are_below_possible_ones() -> None:
    config = BlockMaskConfig(group_size=16)
    drawn = longest("drawn", config, (14, 14), batch_size=64, seed=0)
    assert drawn == longest_drawn(config, (14, 14), 64, 0)
    possible = longest("possible", config, (14, 14), batch_size=64, seed=0)
    assert drawn.context < possible.context and drawn.target <= possible.target


def test_worst_masks_have_these_lengths_and_want_as_many_patches_as_possible() -> None:
    config = BlockMaskConfig(num_context_blocks=2)
    masks = worst_masks(config, 196, Lengths(context=172, target=42), count=3, dense=True)
    assert isinstance(masks, DenseMasks)
    assert masks.context.shape == (2, 3, 172) and masks.targets.shape == (4, 3, 42)
    assert Wanted.of(masks, 3, 196).patches.shape == (3, 168)
    assert all(len(set(row.tolist())) == 42 for row in masks.targets.flatten(0, 1))
    tokens = worst_tokens(config, 196, Lengths(context=172, target=42), images=3)
    packed = worst_masks(config, 196, Lengths(context=172, target=42), count=3, dense=False)
    assert isinstance(packed, PackedMasks)
    assert (tokens.context, tokens.predicted) == (packed.context_layout.total, len(packed.target_rows))
    assert (tokens.predictor, tokens.wanted) == (packed.predictor_layout.total, 168)


@pytest.mark.parametrize(("context", "count"), list(itertools.product(["truncate", "packed"], [4, 8])))
def test_a_probe_draws_as_in_training_until_its_worst_step(context: str, count: int) -> None:
    config = BlockMaskConfig(min_keep=3, group_size=4, context=context)
    sampler = MaskSampler(config, (8, 8), seed=5)
    probe = ProbeMasks(sampler, MaskSampler(config, (8, 8), seed=0).longest(), worst_from=2)
    drawn, expected = probe(1, 0, count, 8), sampler(1, 0, count, 8)
    assert type(drawn) is type(expected) and drawn.mean_tokens() == expected.mean_tokens()
    worst = probe(2, 0, count, 8)
    assert type(worst) is type(sampler(2, 0, count, 8))  # the same layout, and therefore the same kernels
    assert worst.mean_tokens() == (probe._lengths.context, probe._lengths.target)

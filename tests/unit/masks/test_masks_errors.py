"""Mask configurations that can't work are refused before the start; the others pass."""

from __future__ import annotations

import pytest

from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import MaskSampler


@pytest.mark.parametrize(("grid", "group"), [((16, 16), 128), ((16, 16), 32), ((14, 14), 16), ((28, 28), 16)], ids=str)
@pytest.mark.parametrize("name", ["multiblock", "reference"])
def test_published_configurations_pass(grid, group, name) -> None:
    MaskSampler(BlockMaskConfig(sampler=name, group_size=group), grid, seed=0)


@pytest.mark.parametrize(
    ("config", "grid", "expected"),
    [
        (
            BlockMaskConfig(),
            (7, 7),
            "masks.min_keep is 10, but target blocks on a grid of 7x7 patches hold 6 to 12 "
            "(masks.target_scale 0.15 to 0.2) and each must hold more than min_keep; set masks.min_keep: 3",
        ),
        (BlockMaskConfig(), (8, 8), "set masks.min_keep: 3, or raise masks.target_scale"),
        (BlockMaskConfig(sampler="reference"), (8, 8), "set masks.min_keep: 3"),
        (BlockMaskConfig(min_keep=60), (16, 16), "hold 35 to 56 (masks.target_scale 0.15 to 0.2)"),
        (BlockMaskConfig(min_keep=60), (16, 16), "set masks.min_keep: 10"),
        (
            BlockMaskConfig(context_scale=(0.01, 0.02)),
            (16, 16),
            "context blocks on a grid of 16x16 patches hold 1 to 4",
        ),
        (BlockMaskConfig(min_keep=0, target_scale=(0.0, 0.2)), (16, 16), "hold 0 to 56"),
        (BlockMaskConfig(sampler="reference", min_keep=0), (1, 16), "set masks.sampler: multiblock"),
        (BlockMaskConfig(), (0, 5), "the patch grid is 0x5; masks need at least 1x1: raise model.image_size"),
        (
            BlockMaskConfig(target_scale=(0.95, 1.0), target_aspect=(1.0, 1.0)),
            (14, 14),
            "a context block of 13x13 patches without a target block of 14x14 keeps at most 0 on a grid of 14x14",
        ),
        (
            BlockMaskConfig(min_keep=28, target_scale=(0.5, 0.5), target_aspect=(1.0, 1.0), context_scale=(1.0, 1.0)),
            (8, 8),
            "a context block of 8x8 patches without a target block of 6x6 keeps at most 28 on a grid of 8x8",
        ),
        (
            BlockMaskConfig(sampler="reference", target_scale=(1.0, 1.0), target_aspect=(1.0, 1.0)),
            (14, 14),
            "lower masks.target_scale (currently up to 1), raise masks.context_scale (currently from 0.85), "
            "or set masks.allow_overlap: true",
        ),
    ],
)
def test_impossible_configurations_are_refused_with_numbers_and_a_remedy(config, grid, expected) -> None:
    with pytest.raises(ConfigError) as error:
        MaskSampler(config, grid, seed=0)
    assert expected in str(error.value)


def test_one_message_lists_both_problems() -> None:
    with pytest.raises(ConfigError) as error:
        MaskSampler(BlockMaskConfig(context_scale=(0.1, 0.15)), (7, 7), seed=0)
    assert "target blocks" in str(error.value) and "context blocks" in str(error.value)


@pytest.mark.parametrize("grid", [(7, 7), (8, 8)])
@pytest.mark.parametrize("name", ["multiblock", "reference"])
def test_the_proposed_remedy_works_on_small_grids(grid, name) -> None:
    config = BlockMaskConfig(sampler=name, min_keep=3, group_size=64)
    sampler = MaskSampler(config, grid, seed=0)
    for step in range(20):
        assert sampler(step, 0, 64, 64).context.shape[2] > 3


def test_a_target_that_covers_the_context_is_allowed_with_overlap() -> None:
    config = BlockMaskConfig(target_scale=(0.95, 1.0), target_aspect=(1.0, 1.0), allow_overlap=True)
    MaskSampler(config, (14, 14), seed=0)(0, 0, 2, 2)


@pytest.mark.parametrize(("first", "count", "batch"), [(-1, 2, 8), (0, 0, 8), (6, 3, 8)])
def test_positions_outside_the_batch_are_refused(first, count, batch) -> None:
    sampler = MaskSampler(BlockMaskConfig(), (14, 14), seed=0)
    expected = rf"images \[{first}, {first + count}\) are not part of a batch of {batch}; give first >= 0"
    with pytest.raises(ValueError, match=expected):
        sampler(0, first, count, batch)

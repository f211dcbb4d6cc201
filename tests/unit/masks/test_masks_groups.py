"""The sampler's wiring: each group of a batch has its own draw, keyed by its number, the step and the seed."""

from __future__ import annotations

import pytest
import torch

from ijepa_scale import rng
from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MaskSampler
from ijepa_scale.masks.multiblock import MultiblockDraw
from ijepa_scale.masks.reference import sample_reference

GRID, SIZE, BATCH = (14, 14), 4, 12


def drawn(config: BlockMaskConfig, step: int, group: int, seed: int) -> DenseMasks:
    """Returns the draw function's own result for one whole group."""
    if config.sampler == "reference":
        generator = rng.generator(seed, "mask-reference", step, group)
        return sample_reference(config, GRID, step=step, count=SIZE, generator=generator).dense()
    return MultiblockDraw(config, GRID, seed=seed).group(step, group, SIZE).dense()


def equal(ours: DenseMasks, theirs: DenseMasks) -> bool:
    return torch.equal(ours.context, theirs.context) and torch.equal(ours.targets, theirs.targets)


@pytest.mark.parametrize("name", ["multiblock", "reference"])
@pytest.mark.parametrize(("step", "group", "seed"), [(0, 0, 0), (0, 1, 0), (0, 2, 0), (5, 1, 0), (0, 1, 3), (5, 2, 3)])
def test_a_group_is_its_own_draw(name: str, step: int, group: int, seed: int) -> None:
    config = BlockMaskConfig(sampler=name, group_size=SIZE)
    sampler = MaskSampler(config, GRID, seed=seed)
    masks = sampler(step, group * SIZE, SIZE, BATCH)
    assert equal(masks, drawn(config, step, group, seed))
    others = {(0, 0, 0), (0, 1, 0), (5, 1, 0), (0, 1, 3), (1, 0, 0)} - {(step, group, seed)}
    assert not any(equal(masks, drawn(config, *other)) for other in others)
    assert equal(sampler(step, group * SIZE, SIZE, BATCH), masks)  # the second call reads the cache


@pytest.mark.parametrize("name", ["multiblock", "reference"])
def test_groups_draw_their_corners_independently(name: str) -> None:
    """If sizes are equal, only the corners can differ: no group of any step repeats another's."""
    config = BlockMaskConfig(sampler=name, group_size=SIZE, context="packed")
    corners = []
    for step in range(4):
        masks = MaskSampler(config, GRID, seed=0)(step, 0, BATCH, BATCH)
        corner = [block[0] % 196 for block in masks.target_index.split(list(masks.target_layout.lengths))]
        corners += [tuple(map(int, corner[image::BATCH])) for image in range(BATCH)]  # of each image's target blocks
    assert len(set(corners)) == 4 * BATCH


def test_sizes_depend_on_seed_step_and_group() -> None:
    def sizes(seed: int, step: int, group: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return MultiblockDraw(BlockMaskConfig(), (96, 96), seed=seed).block_sizes(step, group)

    found = [sizes(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(len(set(each)) == 4 for each in zip(*found, strict=True))


def test_a_part_of_a_group_is_a_part_of_its_draw() -> None:
    config = BlockMaskConfig(group_size=SIZE)
    masks, whole = MaskSampler(config, GRID, seed=0)(2, 5, 2, BATCH), drawn(config, 2, 1, 0)
    assert equal(masks, DenseMasks(whole.context[:, 1:3], whole.targets[:, 1:3]))

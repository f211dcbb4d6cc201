"""Properties of the mask sampler that hold for every configuration, grid and division of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale import rng
from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MaskSampler, PackedMasks, as_grid, pack, reference
from ijepa_scale.masks.block_sizes import possible_sizes, size_of
from ijepa_scale.masks.group import block_patches, cut_by_key
from ijepa_scale.masks.multiblock import RULE, MultiblockDraw

Lists = list[list[list[int]]]  # [block][image] -> patches


def lists_of(masks: DenseMasks | PackedMasks, patches: int, num_targets: int) -> tuple[Lists, Lists]:
    """Returns context and target lists, read from either kind of masks as its fields are documented."""
    if isinstance(masks, DenseMasks):
        return masks.context.tolist(), masks.targets.tolist()
    images = int(masks.context_index.max()) // patches + 1
    context: Lists = []
    for number, part in enumerate(masks.context_index.split(list(masks.context_layout.lengths))):
        assert set((part // patches).tolist()) == {number % images}
        if number % images == 0:
            context.append([])
        context[-1].append((part % patches).tolist())
    num_contexts = len(context)
    targets: Lists = [[] for _ in range(num_targets)]
    parts = masks.predictor_source.split(list(masks.predictor_layout.lengths))
    offset = len(masks.context_index)
    for number, part in enumerate(parts):
        if (number // images) % num_contexts == 0:
            rows = part[part >= offset] - offset
            targets[number // (images * num_contexts)].append((masks.target_index[rows] % patches).tolist())
    return context, targets


def rows_of(lists: Lists, start: int, stop: int) -> Lists:
    return [block[start:stop] for block in lists]


CONFIGS = st.builds(
    BlockMaskConfig,
    sampler=st.sampled_from(["multiblock", "reference"]),
    context=st.sampled_from(["truncate", "packed"]),
    num_context_blocks=st.integers(1, 2),
    num_target_blocks=st.integers(1, 4),
    context_scale=st.sampled_from([(0.85, 1.0), (0.5, 0.6)]),
    target_scale=st.sampled_from([(0.15, 0.2), (0.1, 0.3)]),
    min_keep=st.integers(0, 3),
    allow_overlap=st.booleans(),
    group_size=st.integers(1, 9),
)
GRIDS = st.sampled_from([(8, 8), (7, 11), (12, 6), (14, 14)])


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, grid=GRIDS, seed=st.integers(0, 5), step=st.integers(0, 1000), data=st.data())
def test_masks_do_not_depend_on_how_a_batch_is_divided(config, grid, seed, step, data) -> None:
    patches, batch = grid[0] * grid[1], data.draw(st.integers(1, 20))
    whole = MaskSampler(config, grid, seed=seed)(step, 0, batch, batch)
    context, targets = lists_of(whole, patches, config.num_target_blocks)
    cuts = sorted(data.draw(st.sets(st.integers(1, batch), max_size=4)) | {0, batch})
    pieces = list(zip(cuts, cuts[1:], strict=False))
    if data.draw(st.booleans()):
        pieces.reverse()  # another process may come first
    sampler = MaskSampler(config, grid, seed=seed)
    for start, stop in pieces:
        masks = sampler(step, start, stop - start, batch)
        one_group = start // config.group_size == (stop - 1) // config.group_size
        assert isinstance(masks, DenseMasks) == (one_group and config.context == "truncate")
        found = lists_of(masks, patches, config.num_target_blocks)
        assert found == (rows_of(context, start, stop), rows_of(targets, start, stop))


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, grid=GRIDS, seed=st.integers(0, 5), step=st.integers(0, 1000), batch=st.integers(1, 20))
def test_masks_are_blocks_in_range_ascending_and_of_one_size_per_group(config, grid, seed, step, batch) -> None:
    height, width = grid
    sampler = MaskSampler(config, grid, seed=seed)
    context, targets = lists_of(sampler(step, 0, batch, batch), height * width, config.num_target_blocks)
    used = (height - 1, width - 1) if config.sampler == "reference" else grid
    for start in range(0, batch, config.group_size):
        sizes, lengths = set(), set()
        for image in range(start, min(start + config.group_size, batch)):
            for block in targets:
                rows, columns = sorted({p // width for p in block[image]}), sorted({p % width for p in block[image]})
                assert block[image] == [r * width + c for r in rows for c in columns]  # a rectangle, row-major
                assert rows == list(range(rows[0], rows[-1] + 1)) and columns == list(
                    range(columns[0], columns[-1] + 1)
                )
                assert rows[0] >= 0 and rows[-1] < used[0] and columns[-1] < used[1]
                sizes.add((len(rows), len(columns)))
            for block in context:
                kept = block[image]
                assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < height * width
                assert all(patch // width < used[0] and patch % width < used[1] for patch in kept)
                assert len(kept) > config.min_keep
                lengths.add(len(kept))
        assert len(sizes) == 1 and sizes <= sampler.draw.sizes.targets
        assert max(lengths) <= sampler.draw.sizes.context_tokens[1]
        if config.context == "truncate":
            assert len(lengths) == 1


@pytest.mark.parametrize("name", ["multiblock", "reference"])
@pytest.mark.parametrize("context", ["truncate", "packed"])
@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (28, 28), (10, 24)])
def test_context_and_targets_are_disjoint(name, context, grid) -> None:
    config = BlockMaskConfig(sampler=name, context=context, group_size=32, num_context_blocks=2)
    sampler = MaskSampler(config, grid, seed=1)
    for step in range(5):
        contexts, targets = lists_of(sampler(step, 0, 48, 48), grid[0] * grid[1], 4)
        for image in range(48):
            taken = {patch for block in targets for patch in block[image]}
            assert all(taken.isdisjoint(block[image]) for block in contexts)


@pytest.mark.parametrize("name", ["multiblock", "reference"])
def test_allow_overlap_removes_nothing_from_the_context(name) -> None:
    config = BlockMaskConfig(sampler=name, allow_overlap=True, group_size=8)
    sampler = MaskSampler(config, (14, 14), seed=0)
    masks = sampler(0, 0, 8, 8)
    height_times_width = masks.context.shape[2]
    assert height_times_width in {h * w for h, w in sampler.draw.sizes.contexts}
    assert as_grid(masks, 0, (14, 14)).ge(2).any()


def test_the_same_call_gives_the_same_masks_and_seed_and_step_change_them() -> None:
    config = BlockMaskConfig(context="packed")

    def targets(seed, step):
        return MaskSampler(config, (14, 14), seed=seed)(step, 0, 8, 8).target_index.tolist()

    assert targets(0, 0) == targets(0, 0)
    assert targets(0, 0) != targets(1, 0)
    assert targets(0, 0) != targets(0, 1)


@pytest.mark.parametrize("name", ["multiblock", "reference"])
def test_the_cache_of_a_sampler_changes_no_masks(name) -> None:
    config, calls = (
        BlockMaskConfig(sampler=name, group_size=4),
        [(0, 0), (1, 0), (0, 4), (7, 8), (0, 0), (1, 4), (0, 0)],
    )
    used = MaskSampler(config, (14, 14), seed=0)
    for step, first in calls:
        masks, fresh = used(step, first, 2, 12), MaskSampler(config, (14, 14), seed=0)(step, first, 2, 12)
        assert torch.equal(masks.context, fresh.context) and torch.equal(masks.targets, fresh.targets)
        masks.context.zero_()  # a caller that changes its masks must not change the cache
        masks.targets.zero_()


def test_global_generators_are_not_used() -> None:
    for name in ("multiblock", "reference"):
        sampler = MaskSampler(BlockMaskConfig(sampler=name), (14, 14), seed=0)
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        sampler(0, 0, 4, 4)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]


def test_groups_of_a_step_have_their_own_sizes_in_multiblock() -> None:
    sampler = MaskSampler(BlockMaskConfig(group_size=4), (16, 16), seed=0)
    sizes = {sampler(0, group * 4, 4, 80).targets.shape[2] for group in range(20)}
    assert len(sizes) > 3


def test_the_cut_covers_the_whole_of_an_incomplete_last_group() -> None:
    sampler = MaskSampler(BlockMaskConfig(group_size=8, context="truncate"), (14, 14), seed=0)
    whole = MaskSampler(BlockMaskConfig(group_size=8, context="packed"), (14, 14), seed=0)
    for batch in (11, 16):
        lengths = whole(0, 8, batch - 8, batch).context_layout.lengths
        assert sampler(0, 8, 1, batch).context.shape[2] == min(lengths)


def test_multiblock_reaches_every_patch_and_truncation_keeps_the_whole_image() -> None:
    config = BlockMaskConfig(group_size=128)
    context, target, bottom = np.zeros((16, 16)), np.zeros((16, 16)), []
    for step in range(40):
        masks = MaskSampler(config, (16, 16), seed=0)(step, 0, 128, 128)
        kept = np.zeros((128, 256))
        np.put_along_axis(kept, masks.context[0].numpy(), 1, axis=1)
        context += kept.mean(axis=0).reshape(16, 16) / 40
        bottom.append(kept.reshape(-1, 16, 16)[:, 8:].sum() / kept.sum())
        np.add.at(target.reshape(-1), masks.targets.numpy().ravel(), 1)
    assert context.min() > 0.05 and target.min() > 0
    assert context[15].mean() > 0.1 and context[:, 15].mean() > 0.1
    assert abs(np.mean(bottom) - 0.5) < 0.02  # the published cut leaves 0.2 below the middle


def test_multiblock_draws_scale_and_aspect_independently() -> None:
    config, grid = BlockMaskConfig(), (28, 28)
    draw = MultiblockDraw(config, grid, seed=0)
    both = np.array([draw.block_sizes(step, group=0) for step in range(400)])
    sizes, context_area = both[:, 0], both[:, 1].prod(axis=1)
    area, aspect = sizes.prod(axis=1), sizes[:, 0] / sizes[:, 1]
    found = np.corrcoef([area, aspect, context_area])
    assert np.abs(found - np.eye(3)).max() < 0.15  # 3 standard errors of 400 draws
    assert 0.70 < aspect.min() < 0.8 and 1.4 < aspect.max() < 1.6


def test_a_context_block_of_scale_one_is_the_whole_image_on_any_grid() -> None:
    for grid in ((16, 16), (8, 20), (24, 10)):
        config = BlockMaskConfig(context_scale=(1.0, 1.0), min_keep=3)
        assert possible_sizes(config, grid, RULE).contexts == {grid}
    half = BlockMaskConfig(context_scale=(0.5, 0.5), min_keep=3)
    assert possible_sizes(half, (8, 20), RULE).contexts == {(6, 14)}  # 80 patches in the grid's own shape


def test_if_the_grid_cuts_one_side_the_other_grows() -> None:
    assert size_of(RULE, (4, 32), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)) == (4, 16)
    assert size_of(RULE, (32, 4), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)) == (16, 4)
    assert size_of(RULE, (16, 16), (0.25, 0.25), (1.0, 1.0), (0.0, 0.0)) == (8, 8)


@pytest.mark.parametrize("grid", [(16, 16), (9, 13)])
@pytest.mark.parametrize("name", ["multiblock", "reference"])
def test_possible_sizes_are_those_that_are_drawn(grid, name) -> None:
    config = BlockMaskConfig(sampler=name, min_keep=0, target_scale=(0.1, 0.4), context_scale=(0.3, 1.0))
    if name == "multiblock":
        draw = MultiblockDraw(config, grid, seed=0)
        sizes, drawn = draw.sizes, [draw.block_sizes(step, group=0) for step in range(3000)]
    else:
        sizes = reference.ReferenceDraw(config, grid, seed=0).sizes
        drawn = [reference.block_sizes(config, grid, step) for step in range(3000)]
    assert {target for target, _ in drawn} <= sizes.targets
    assert {context for _, context in drawn} <= sizes.contexts
    assert len({target for target, _ in drawn}) > 0.8 * len(sizes.targets)
    assert len({context for _, context in drawn}) > 0.8 * len(sizes.contexts)


def literal_multiblock(config, grid, *, seed, step, group, positions):
    """Returns context and target lists, drawn image by image and patch by patch as the specification describes."""
    draw = MultiblockDraw(config, grid, seed=seed)
    (target_h, target_w), (context_h, context_w) = draw.block_sizes(step, group)
    height, width = grid
    contexts = [[] for _ in range(config.num_context_blocks)]
    targets = [[] for _ in range(config.num_target_blocks)]
    for position in positions:
        draws = rng.uniform(seed, "mask-place", step, np.array([position]), len(targets) + len(contexts))[0]
        mine = []
        for block in range(len(targets)):
            tops, lefts = height - target_h + 1, width - target_w + 1
            top, left = divmod(int(draws[block] * (tops * lefts)), lefts)
            mine.append([r * width + c for r in range(top, top + target_h) for c in range(left, left + target_w)])
            targets[block].append(mine[-1])
        for block in range(len(contexts)):
            for spared in range(len(targets) + 1):
                out = set() if config.allow_overlap else {p for t in mine[: len(mine) - spared] for p in t}
                choices = []
                for top in range(height - context_h + 1):
                    for left in range(width - context_w + 1):
                        rows, columns = range(top, top + context_h), range(left, left + context_w)
                        kept = [r * width + c for r in rows for c in columns if r * width + c not in out]
                        if len(kept) > config.min_keep:
                            choices.append(kept)
                if choices:
                    break
            contexts[block].append(choices[int(draws[len(targets) + block] * len(choices))])
    if config.context == "truncate":
        patches, shortest = height * width, min(len(kept) for block in contexts for kept in block)
        for block in range(len(contexts)):
            for image, position in enumerate(positions):
                keys = rng.uniform(seed, "mask-cut", step, np.array([position]), patches * len(contexts))[0]
                by_key = sorted(contexts[block][image], key=lambda p: keys[block * patches + p])  # noqa: B023
                contexts[block][image] = sorted(by_key[:shortest])
    return contexts, targets


LITERAL = {
    "default": (BlockMaskConfig(), (16, 16)),
    "packed": (BlockMaskConfig(context="packed"), (14, 14)),
    "wide grid": (BlockMaskConfig(min_keep=5), (8, 20)),
    "two contexts": (BlockMaskConfig(num_context_blocks=2, context_scale=(0.3, 0.6)), (14, 14)),
    "overlap": (BlockMaskConfig(allow_overlap=True), (14, 14)),
    "crowded": (BlockMaskConfig(min_keep=12, context_scale=(0.3, 0.5), target_scale=(0.25, 0.35)), (8, 8)),
}


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("step", [0, 3])
def test_multiblock_equals_a_loop_over_images(name, step) -> None:
    config, grid = LITERAL[name]
    positions = np.arange(24) + 2 * config.group_size
    masks = MultiblockDraw(config, grid, seed=2).group(step, 2, 24)
    contexts, targets = literal_multiblock(config, grid, seed=2, step=step, group=2, positions=positions.tolist())
    assert masks.targets.tolist() == targets
    assert [[np.flatnonzero(row).tolist() for row in block] for block in masks.context] == contexts


def test_the_crowded_case_keeps_targets_only_if_no_corner_is_left() -> None:
    config, grid = LITERAL["crowded"]
    spared = 0
    for step in range(20):
        masks = MultiblockDraw(config, grid, seed=2).group(step, 0, 64)
        overlap = [masks.context[0, i][masks.targets[:, i]].any() for i in range(64)]
        spared += sum(overlap)
    assert 0 < spared < 20 * 64


def test_the_cut_is_a_uniform_subset_even_where_keys_are_equal() -> None:
    context = np.ones((1, 2000, 6), dtype=bool)
    context[0, 0, 3:] = False
    keys = np.random.default_rng(0).random((1, 2000, 6))
    cut = cut_by_key(context, keys)
    assert (cut.sum(axis=2) == 3).all() and not (cut & ~context).any()
    assert np.abs(cut[0, 1:].mean(axis=0) - 0.5).max() < 0.04  # 3.5 standard errors of 2000 images
    assert cut_by_key(context, np.zeros_like(keys)).sum(axis=2).tolist() == [[3] * 2000]


def test_block_patches_are_row_major() -> None:
    assert block_patches(np.array([1]), np.array([2]), (2, 3), 10).tolist() == [[12, 13, 14, 22, 23, 24]]


@pytest.mark.parametrize("context", ["truncate", "packed"])
def test_pictures_show_context_and_targets(context) -> None:
    config, grid = BlockMaskConfig(min_keep=3, context=context, num_context_blocks=2), (7, 11)
    masks = MaskSampler(config, grid, seed=0)(0, 0, 3, 3)
    contexts, targets = lists_of(masks, 77, 4)
    for image in range(3):
        expected = np.zeros(77, dtype=np.int64)
        for block in contexts:
            expected[block[image]] = 1
        for number, block in enumerate(targets):
            expected[block[image]] = 2 + number
        assert as_grid(masks, image, grid).tolist() == expected.reshape(grid).tolist()
        if isinstance(masks, DenseMasks):
            assert torch.equal(as_grid(pack(masks, 77), image, grid), as_grid(masks, image, grid))
    with pytest.raises(IndexError, match="image 3 is out of range for masks of 3 images; give 0 to 2"):
        as_grid(masks, 3, grid)

"""Compares the reference sampler with a slow, literal version of the published draw and with its measured lengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ijepa_scale import rng
from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MaskSampler
from ijepa_scale.masks.block_sizes import size_of
from ijepa_scale.masks.reference import RULE, sample_reference


def literal_size(height: int, width: int, scale: tuple, aspect: tuple, r: float) -> tuple[int, int]:
    patches = int(height * width * (scale[0] + r * (scale[1] - scale[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    h, w = int(round(math.sqrt(patches * ratio))), int(round(math.sqrt(patches / ratio)))
    while h >= height:
        h -= 1
    while w >= width:
        w -= 1
    return h, w


def literal_block(height: int, width: int, size: tuple[int, int]) -> list[int]:
    """Returns the patches of one block in row-major order, drawn from torch's global generator."""
    h, w = size
    top = torch.randint(0, height - h, (1,)).item()
    left = torch.randint(0, width - w, (1,)).item()
    return [row * width + column for row in range(top, top + h) for column in range(left, left + w)]


def literal_batch(config: BlockMaskConfig, grid: tuple[int, int], step: int, count: int):
    """Returns context lists [block][image] and target lists [block][image], drawn as the specification describes."""
    generator = torch.Generator()
    generator.manual_seed(step)
    r_target = torch.rand(1, generator=generator).item()
    r_context = torch.rand(1, generator=generator).item()
    target_size = literal_size(*grid, config.target_scale, config.target_aspect, r_target)
    context_size = literal_size(*grid, config.context_scale, (1.0, 1.0), r_context)
    targets = [[] for _ in range(config.num_target_blocks)]
    contexts = [[] for _ in range(config.num_context_blocks)]
    for _ in range(count):
        mine = []
        for block in range(config.num_target_blocks):
            while True:
                target = literal_block(*grid, target_size)
                if len(target) > config.min_keep:
                    break
            mine.append(target)
            targets[block].append(target)
        for block in range(config.num_context_blocks):
            failures, spared = 0, 0
            while True:
                out = set()
                if not config.allow_overlap:
                    for target in mine[: max(0, len(mine) - spared)]:
                        out.update(target)
                kept = [patch for patch in literal_block(*grid, context_size) if patch not in out]
                if len(kept) > config.min_keep:
                    break
                failures += 1
                if failures == 20:
                    failures, spared = 0, spared + 1
            contexts[block].append(kept)
    if config.context == "truncate":
        shortest = min(len(kept) for block in contexts for kept in block)
        contexts = [[kept[:shortest] for kept in block] for block in contexts]
    return contexts, targets


CASES = {
    "224/14": (BlockMaskConfig(sampler="reference"), (16, 16)),
    "224/16": (BlockMaskConfig(sampler="reference"), (14, 14)),
    "448/16": (BlockMaskConfig(sampler="reference"), (28, 28)),
    "wide grid": (BlockMaskConfig(sampler="reference", min_keep=5), (8, 20)),
    "two contexts": (BlockMaskConfig(sampler="reference", num_context_blocks=2, context_scale=(0.3, 0.6)), (16, 16)),
    "overlap": (BlockMaskConfig(sampler="reference", allow_overlap=True), (14, 14)),
    "packed": (BlockMaskConfig(sampler="reference", context="packed"), (14, 14)),
    # Large targets and small contexts on a small grid: contexts are redrawn, and targets stay in them.
    "crowded": (
        BlockMaskConfig(sampler="reference", min_keep=11, context_scale=(0.4, 0.6), target_scale=(0.3, 0.4)),
        (8, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [0, 1, 625])
def test_masks_equal_the_literal_version(name: str, step: int) -> None:
    config, grid = CASES[name]
    MaskSampler(config, grid, seed=0)  # raises if the configuration can't work
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        contexts, targets = literal_batch(config, grid, step, 24)
    generator = torch.Generator().manual_seed(17)
    masks = sample_reference(config, grid, step=step, count=24, generator=generator)
    assert masks.targets.tolist() == targets
    for block, kept in enumerate(contexts):
        assert [np.flatnonzero(row).tolist() for row in masks.context[block]] == kept


def test_in_the_crowded_case_some_targets_stay_in_the_context() -> None:
    config, grid = CASES["crowded"]
    overlapping = 0
    for step in range(10):
        masks = sample_reference(config, grid, step=step, count=24, generator=torch.Generator().manual_seed(17))
        for image in range(24):
            overlapping += bool(masks.context[0, image][masks.targets[:, image]].any())
    assert overlapping > 0


def test_one_generator_reproduces_the_stream_of_consecutive_batches() -> None:
    config = BlockMaskConfig(sampler="reference")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(3):
            contexts, targets = literal_batch(config, (14, 14), step, 8)
            masks = sample_reference(config, (14, 14), step=step, count=8, generator=generator).dense()
            assert masks.context.tolist() == contexts
            assert masks.targets.tolist() == targets


def test_sampler_gives_each_group_the_sizes_of_the_step_and_its_own_generator() -> None:
    config = BlockMaskConfig(sampler="reference", group_size=8)
    sampler = MaskSampler(config, (14, 14), seed=5)
    for group in range(2):
        masks = sampler(3, group * 8, 8, 16)
        assert isinstance(masks, DenseMasks)
        generator = rng.generator(5, "mask-reference", 3, group)
        expected = sample_reference(config, (14, 14), step=3, count=8, generator=generator).dense()
        assert torch.equal(masks.context, expected.context)
        assert torch.equal(masks.targets, expected.targets)
    assert sampler(3, 0, 8, 16).targets.shape == sampler(3, 8, 8, 16).targets.shape


def test_size_rounds_half_to_even_and_stays_below_the_grid() -> None:
    assert size_of(RULE, (16, 16), (1.0, 1.0), (1.0, 1.0), (0.5, 0.5)) == (15, 15)
    assert size_of(RULE, (5, 5), (0.24, 0.24), (1.5, 1.5), (0.0, 0.0)) == (3, 2)  # 6 patches: sqrt(9), sqrt(4)
    assert size_of(RULE, (10, 10), (0.25, 0.25), (0.25, 0.25), (0.0, 0.0)) == (2, 9)  # 2.5 rounds to 2; 10 is cut to 9
    assert size_of(RULE, (28, 28), (0.15, 0.2), (0.75, 1.5), (0.0, 0.0)) == literal_size(
        28, 28, (0.15, 0.2), (0.75, 1.5), 0.0
    )


# (grid, images per process, mean context tokens before and after the cut, fewest and most tokens per target, steps,
# tolerance), measured with the published collator. The tolerance is three standard errors of the mean over `steps`
# (tokens after the cut have a standard deviation of 9.6, 6.9, 8.1 and 39.8 over steps, because block sizes differ),
# plus half a token for the table's rounding.
PUBLISHED = [
    ((16, 16), 128, 110, 68, (35, 54), 150, 2.9),
    ((14, 14), 128, 82, 51, (30, 40), 150, 2.2),
    ((14, 14), 16, 82, 60, (30, 40), 400, 1.8),
    ((28, 28), 16, 359, 271, (108, 154), 500, 5.9),
]


@pytest.mark.parametrize(("grid", "count", "before", "after", "target", "steps", "tolerance"), PUBLISHED)
def test_token_counts_equal_the_measured_ones(grid, count, before, after, target, steps, tolerance) -> None:
    sampler = MaskSampler(BlockMaskConfig(sampler="reference", context="packed", group_size=count), grid, seed=0)
    packs = [sampler(step, 0, count, count) for step in range(steps)]
    lengths = np.array([pack.context_layout.lengths for pack in packs])
    sizes = [len(pack.target_rows) // (4 * count) for pack in packs]
    assert abs(lengths.mean() - before) < tolerance
    assert abs(lengths.min(axis=1).mean() - after) < tolerance
    assert (min(sizes), max(sizes)) == target
    assert sampler.draw.sizes.target_tokens == target
    assert 3 * lengths.min(axis=1).std() / math.sqrt(steps) + 0.5 < tolerance + 0.1  # the tolerance is as stated above


def test_the_cut_removes_the_bottom_and_the_last_row_and_column_are_never_used() -> None:
    share = np.zeros((16, 16))  # share of images in which the patch is context
    cut_share = np.zeros((16, 16))
    steps = 20
    for step in range(steps):
        for context, result in (("packed", share), ("truncate", cut_share)):
            config = BlockMaskConfig(sampler="reference", context=context)
            generator = torch.Generator().manual_seed(step)
            masks = sample_reference(config, (16, 16), step=step, count=128, generator=generator)
            result += masks.context[0].reshape(-1, 16, 16).mean(axis=0) / steps
            assert masks.targets.max() < 15 * 16 and (masks.targets % 16).max() < 15
    for result in (share, cut_share):
        assert not result[15].any() and not result[:, 15].any()
    # The last used row, averaged over its 16 patches, is context in 77% of images before the cut and in 1% after it.
    assert abs(share[14].mean() - 0.77) < 0.02
    assert cut_share[14].mean() < 0.03

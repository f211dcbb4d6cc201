"""The published mask draw with its quirks, from an explicit generator.

It reproduces the masks of published runs exactly; `multiblock` is the corrected draw. Quirks: one random number sets
both scale and aspect of a block; the last row and column are never used; the cut keeps the first tokens in row-major
order, so it removes the bottom of images.

Source: released I-JEPA code (arXiv 2301.08243), multi-block mask collator (behaviour only).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ijepa_scale import rng
from ijepa_scale.config.schema import BlockMaskConfig
from ijepa_scale.masks.block_sizes import BlockRule, Size, check, context_size, longest_blocks, size_of
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.masks.group import GroupMasks, block_patches, cut_first

_PATIENCE = 20  # failed draws after which one more target stays in the context


def shorter_sides(grid: Size, area: int, aspect: float) -> Size:
    """Returns the sides of a block of about `area` patches, each shorter than the grid's side (0 if that is 1).

    Source: released I-JEPA code (arXiv 2301.08243), multi-block mask collator.
    """
    height, width = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


RULE = BlockRule(sides=shorter_sides, unused=1, coupled=True, context_aspect=lambda grid: 1.0)


class ReferenceDraw:
    """The sampler `reference`.

    As published, block sizes depend only on the step, not on the seed: all groups of a step have the same sizes, as all
    processes of a published run had. Corners come from a generator keyed by (seed, step, group).
    """

    Config = BlockMaskConfig

    def __init__(self, config: BlockMaskConfig, grid: Size, *, seed: int) -> None:
        self.sizes = check(config, grid, RULE)
        self._config, self._grid, self._seed = config, grid, seed

    def longest(self) -> Lengths:
        """Returns upper bounds on the lengths of context and target blocks."""
        return longest_blocks(self._config, self._grid, self.sizes, RULE)

    def group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group."""
        generator = rng.generator(self._seed, "mask-reference", step, group)
        return sample_reference(self._config, self._grid, step=step, count=count, generator=generator)


def block_sizes(config: BlockMaskConfig, grid: Size, step: int) -> tuple[Size, Size]:
    """Returns the sizes of target and context blocks at a step; they depend only on the step."""
    generator = torch.Generator().manual_seed(step)
    target_draw = torch.rand(1, generator=generator).item()  # on the host: no synchronisation
    context_draw = torch.rand(1, generator=generator).item()
    target = size_of(RULE, grid, config.target_scale, config.target_aspect, (target_draw, target_draw))
    return target, context_size(RULE, grid, config.context_scale, context_draw)


def sample_reference(
    config: BlockMaskConfig, grid: Size, *, step: int, count: int, generator: torch.Generator
) -> GroupMasks:
    """Returns the masks of `count` images as the published collator draws them for one batch.

    Draws corners from `generator`, which advances: image by image, targets before contexts, row before column. The
    published collator uses its process's global generator. A generator with the same seed, passed on from batch to
    batch, reproduces its stream for steps 0, 1, .... `config` must have passed `check`; otherwise the loop may not end.
    """
    target_size, context_block = block_sizes(config, grid, step)
    patches = grid[0] * grid[1]
    targets = np.empty((config.num_target_blocks, count, target_size[0] * target_size[1]), dtype=np.int64)
    context = np.zeros((config.num_context_blocks, count, patches), dtype=bool)
    for image in range(count):
        for block in range(config.num_target_blocks):
            targets[block, image] = _draw_block(target_size, grid, generator)
        taken_out = targets[:0, image] if config.allow_overlap else targets[:, image]
        for block in range(config.num_context_blocks):
            context[block, image] = _draw_context(config, context_block, grid, taken_out, generator)
    return GroupMasks(cut_first(context) if config.context == "truncate" else context, targets)


def _draw_block(size: Size, grid: Size, generator: torch.Generator) -> np.ndarray:
    """Returns the patches of one block at a random corner; as published, never at the last possible corner."""
    top = int(torch.randint(0, grid[0] - size[0], (1,), generator=generator))
    left = int(torch.randint(0, grid[1] - size[1], (1,), generator=generator))
    return block_patches(np.asarray(top), np.asarray(left), size, grid[1])


def _draw_context(
    config: BlockMaskConfig, size: Size, grid: Size, targets: np.ndarray, generator: torch.Generator
) -> np.ndarray:
    """Returns (N,) bool: a context block without `targets` (M, T), or after failures without only the first of them."""
    failures = 0
    while True:
        kept = np.zeros(grid[0] * grid[1], dtype=bool)
        kept[_draw_block(size, grid, generator)] = True
        kept[targets[: max(0, len(targets) - failures // _PATIENCE)]] = False
        if kept.sum() > config.min_keep:
            return kept
        failures += 1

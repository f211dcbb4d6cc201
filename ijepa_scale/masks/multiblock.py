"""The default mask draw: the paper's multi-block masks over the whole grid, drawn for a group at once.

Differs from the reference: blocks can reach the last row and column, scale and aspect are independent, and a
cut keeps a random subset of the context instead of the top of the image. Every random number is keyed by
(seed, step, position in the global batch); none depends on how the batch is divided.
"""

from __future__ import annotations

import math

import numpy as np

from ijepa_scale import rng
from ijepa_scale.config.schema import BlockMaskConfig
from ijepa_scale.masks.block_sizes import BlockRule, Size, check, context_size, longest_blocks, size_of
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.masks.group import GroupMasks, block_patches, cut_by_key

# Random streams. "mask-size": per group, target scale, target aspect and context scale. "mask-place": per image, one
# number per target block, then one per context block. "mask-cut": per image, one key per context block and patch.


def fitted_sides(grid: Size, area: int, aspect: float) -> Size:
    """Returns the sides of a block of about `area` patches; if the grid cuts one side, the other grows."""
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height > grid[0]:
        height, width = grid[0], round(area / grid[0])
    elif width > grid[1]:
        height, width = round(area / grid[1]), grid[1]
    return min(height, grid[0]), min(width, grid[1])


# differs from the reference: scale and aspect are drawn separately, because one number for both makes every small block
# wide and every large one tall. Context blocks have the grid's aspect, so that scale 1 is the whole image on any grid.
RULE = BlockRule(sides=fitted_sides, unused=0, coupled=False, context_aspect=lambda grid: grid[0] / grid[1])


class MultiblockDraw:
    """The sampler `multiblock`."""

    Config = BlockMaskConfig

    def __init__(self, config: BlockMaskConfig, grid: Size, *, seed: int) -> None:
        self.sizes = check(config, grid, RULE)
        self._config, self._grid, self._seed = config, grid, seed

    def longest(self) -> Lengths:
        """Returns upper bounds on the lengths of context and target blocks."""
        return longest_blocks(self._config, self._grid, self.sizes, RULE)

    def block_sizes(self, step: int, group: int) -> tuple[Size, Size]:
        """Returns the sizes of a group's target and context blocks."""
        config = self._config
        draws = rng.uniform(self._seed, "mask-size", step, np.array([group]), 3)[0].tolist()
        target = size_of(RULE, self._grid, config.target_scale, config.target_aspect, (draws[0], draws[1]))
        return target, context_size(RULE, self._grid, config.context_scale, draws[2])

    def group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group."""
        config, grid = self._config, self._grid
        positions = group * config.group_size + np.arange(count)
        target_size, block = self.block_sizes(step, group)
        num_targets, num_contexts = config.num_target_blocks, config.num_context_blocks
        draws = rng.uniform(self._seed, "mask-place", step, positions, num_targets + num_contexts).T
        tops, lefts = grid[0] - target_size[0] + 1, grid[1] - target_size[1] + 1  # the last possible corner is included
        corner = (draws[:num_targets] * (tops * lefts)).astype(np.int64)
        targets = block_patches(corner // lefts, corner % lefts, target_size, grid[1])
        taken_out = targets[:0] if config.allow_overlap else targets
        context = np.stack([_contexts(config.min_keep, block, grid, taken_out, u) for u in draws[num_targets:]])
        if config.context == "truncate":
            context = self._cut(context, step, positions)
        return GroupMasks(context, targets)

    def _cut(self, context: np.ndarray, step: int, positions: np.ndarray) -> np.ndarray:
        """Returns the contexts (E, B, N) bool, each cut to a random subset of the length of the group's shortest."""
        blocks, images, patches = context.shape
        keys = rng.uniform(self._seed, "mask-cut", step, positions, blocks * patches)
        return cut_by_key(context, keys.reshape(images, blocks, patches).swapaxes(0, 1))


def _contexts(min_keep: int, size: Size, grid: Size, targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Returns (B, N) bool: one context block per image without its targets (M, B, T).

    The corner is uniform among all corners that leave more than `min_keep` patches. This has the distribution of
    redrawing until success, without the redraws. If an image has no such corner, its last target stays in the
    context, then its last two, and so on. (The reference does the same, but after 20 failures, even if a corner
    exists.) Without any target removed every corner is allowed, so the loop always succeeds.
    """
    num_images, patches = len(draws), grid[0] * grid[1]
    context = np.zeros((num_images, patches), dtype=bool)
    pending = np.arange(num_images)
    for num_out in range(len(targets), -1, -1):
        free = np.ones((len(pending), *grid), dtype=bool)
        taken = targets[:num_out, pending] + np.arange(len(pending))[:, None] * patches
        free.reshape(-1)[taken.ravel()] = False
        allowed = (_counts(free, size) > min_keep).reshape(len(pending), -1)
        chosen = (draws[pending] * allowed.sum(axis=1)).astype(np.int64)  # the chosen-th allowed corner
        corner = np.argmax(np.cumsum(allowed, axis=1) > chosen[:, None], axis=1)
        lefts = grid[1] - size[1] + 1
        rows = _span(corner // lefts, size[0], grid[0])[:, :, None]
        columns = _span(corner % lefts, size[1], grid[1])[:, None, :]
        context[pending] = (free & rows & columns).reshape(len(pending), patches)
        pending = pending[~allowed.any(axis=1)]
        if not len(pending):
            break
    assert not len(pending), "`check` ensures that context blocks have more than min_keep patches"
    return context


def _span(start: np.ndarray, length: int, total: int) -> np.ndarray:
    """Returns (B, total) bool: true in [start, start + length)."""
    offset = np.arange(total) - start[:, None]
    return (offset >= 0) & (offset < length)


def _counts(free: np.ndarray, size: Size) -> np.ndarray:
    """Returns (B, tops, lefts) fp32: the number of free patches (B, H, W) that a block would cover at each corner."""
    _, rows, columns = free.shape
    # products with bands of ones: exact in fp32, and eight times as fast as differences of cumulative sums
    across = free.reshape(-1, columns).astype(np.float32) @ _spans(size[1], columns).T
    return _spans(size[0], rows) @ across.reshape(len(free), rows, -1)


def _spans(length: int, total: int) -> np.ndarray:
    """Returns (total - length + 1, total) fp32: in row i, ones in [i, i + length)."""
    return _span(np.arange(total - length + 1), length, total).astype(np.float32)

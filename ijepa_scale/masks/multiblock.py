"""The default mask draw: the paper's multi-block masks over the whole grid, for a group at once.

Differs from the reference: the last row and column take part, scale and aspect are independent, and a
cut keeps a random subset of the context instead of the top of the image. Every number is keyed by
(seed, step, place in the global batch), none by how the batch is divided.
"""

from __future__ import annotations

import numpy as np

from ijepa_scale import rng
from ijepa_scale.config.schema import BlockMaskConfig
from ijepa_scale.masks.block_sizes import Size, context_aspect, multiblock_size
from ijepa_scale.masks.group import GroupMasks, block_places, cut_by_key

# Streams: "mask-size" per group (target scale, target aspect, context scale); "mask-place" per image (one
# number per target, then one per context block); "mask-cut" per image (one key per context block and patch).


def block_sizes(config: BlockMaskConfig, grid: Size, *, seed: int, step: int, group: int) -> tuple[Size, Size]:
    """Returns the sizes of target and context blocks of a group."""
    scale, aspect, context_scale = rng.uniform(seed, "mask-size", step, np.array([group]), 3)[0].tolist()
    target = multiblock_size(grid, config.target_scale, config.target_aspect, (scale, aspect))
    context = multiblock_size(grid, config.context_scale, context_aspect(config, grid), (context_scale, 0.0))
    return target, context


def sample_multiblock(
    config: BlockMaskConfig, grid: Size, *, seed: int, step: int, group: int, places: np.ndarray
) -> GroupMasks:
    """Returns the masks of the images at `places` (B,) int64 of the global batch, the whole of one group.

    `config` must have passed `sizes.check`.
    """
    target_size, context_size = block_sizes(config, grid, seed=seed, step=step, group=group)
    num_targets, num_contexts = config.num_target_blocks, config.num_context_blocks
    draws = rng.uniform(seed, "mask-place", step, places, num_targets + num_contexts).T
    tops, lefts = grid[0] - target_size[0] + 1, grid[1] - target_size[1] + 1  # upper ends included
    corner = (draws[:num_targets] * (tops * lefts)).astype(np.int64)
    targets = block_places(corner // lefts, corner % lefts, target_size, grid[1])
    taken_out = targets[:0] if config.allow_overlap else targets
    context = np.stack([_contexts(config.min_keep, context_size, grid, taken_out, u) for u in draws[num_targets:]])
    if config.context == "truncate":
        patches = grid[0] * grid[1]
        keys = rng.uniform(seed, "mask-cut", step, places, num_contexts * patches)
        context = cut_by_key(context, keys.reshape(len(places), num_contexts, patches).swapaxes(0, 1))
    return GroupMasks(context, targets)


def _contexts(min_keep: int, size: Size, grid: Size, targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Returns (B, N) bool: one context block per image without its targets (M, B, T).

    The place is uniform among all places at which more than `min_keep` patches are left: what redrawing
    until success converges to, without the redraws. An image that has no such place keeps the patches of
    its last target, then of the last two, ... (as the reference does, but that gives up after 20 failures
    even where a place exists). With no target taken out every place serves, so this ends.
    """
    num_images, patches = len(draws), grid[0] * grid[1]
    context = np.zeros((num_images, patches), dtype=bool)
    pending = np.arange(num_images)
    for num_out in range(len(targets), -1, -1):
        free = np.ones((len(pending), *grid), dtype=bool)
        taken = targets[:num_out, pending] + np.arange(len(pending))[:, None] * patches
        free.reshape(-1)[taken.ravel()] = False
        allowed = (_counts(free, size) > min_keep).reshape(len(pending), -1)
        chosen = (draws[pending] * allowed.sum(axis=1)).astype(np.int64)  # the chosen-th allowed place
        corner = np.argmax(np.cumsum(allowed, axis=1) > chosen[:, None], axis=1)
        lefts = grid[1] - size[1] + 1
        rows = _span(corner // lefts, size[0], grid[0])[:, :, None]
        columns = _span(corner % lefts, size[1], grid[1])[:, None, :]
        context[pending] = (free & rows & columns).reshape(len(pending), patches)
        pending = pending[~allowed.any(axis=1)]
        if not len(pending):
            break
    assert not len(pending), "sizes.check lets only context blocks of more than min_keep patches pass"
    return context


def _span(start: np.ndarray, length: int, total: int) -> np.ndarray:
    """Returns (B, total) bool: true at [start, start + length)."""
    offset = np.arange(total) - start[:, None]
    return (offset >= 0) & (offset < length)


def _counts(free: np.ndarray, size: Size) -> np.ndarray:
    """Returns the free patches (B, tops, lefts) of a block at each of its places in (B, H, W) bool."""
    _, rows, columns = free.shape
    # products with bands of ones: exact in fp32, and eight times as fast as differences of running sums
    across = free.reshape(-1, columns).astype(np.float32) @ _spans(size[1], columns).T
    return _spans(size[0], rows) @ across.reshape(len(free), rows, -1)


def _spans(length: int, total: int) -> np.ndarray:
    """Returns (total - length + 1, total) fp32: ones at each place of a span of this length."""
    return _span(np.arange(total - length + 1), length, total).astype(np.float32)

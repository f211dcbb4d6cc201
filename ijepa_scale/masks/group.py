"""Masks of a group: images that share block sizes and one cut. Host memory only; must not know step or seed.

Legend: E context blocks, M target blocks, B images, N patches of an image, T patches of a target block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_scale.masks.types import DenseMasks


@dataclass(frozen=True)
class GroupMasks:
    """Masks of consecutive images of one group, after the group's cut if it has one."""

    context: np.ndarray  # (E, B, N) bool: the patch is context
    targets: np.ndarray  # (M, B, T) int64, ascending along T

    def rows(self, start: int, stop: int) -> GroupMasks:
        """Returns the masks of images [start, stop), counted within this group."""
        return GroupMasks(self.context[:, start:stop], self.targets[:, start:stop])

    def dense(self) -> DenseMasks:
        """Returns the masks as rectangular tensors. All images must keep the same number of context tokens."""
        blocks, images, _ = self.context.shape
        lengths = self.context.sum(axis=2)
        if lengths.min() != lengths.max():
            raise ValueError(
                f"contexts of a group have {lengths.min()} to {lengths.max()} tokens; a sampler must cut them to one "
                "length if masks.context is truncate"
            )
        patches = patches_of(self.context).reshape(blocks, images, -1)
        return DenseMasks(torch.from_numpy(patches), torch.from_numpy(self.targets.copy()))


def block_patches(top: np.ndarray, left: np.ndarray, size: tuple[int, int], columns: int) -> np.ndarray:
    """Returns the patches (..., h * w) int64, ascending, of blocks with upper left corners (`top`, `left`) (...)."""
    height, width = size
    inside = (np.arange(height)[:, None] * columns + np.arange(width)).ravel()
    return (top * columns + left)[..., None] + inside


def patches_of(masks: np.ndarray) -> np.ndarray:
    """Returns the patch indices int64 of masks (..., N) bool, one mask after another, ascending within each."""
    return np.flatnonzero(masks) % masks.shape[-1]


def shortest(context: np.ndarray) -> int:
    """Returns the smallest number of context tokens over all blocks and images of (E, B, N) bool."""
    return int(context.sum(axis=2).min())


def cut_first(context: np.ndarray) -> np.ndarray:
    """Cuts every context in (E, B, N) bool to the length of the shortest by keeping its first tokens."""
    return context & (np.cumsum(context, axis=2) <= shortest(context))


def cut_by_key(context: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Cuts every context in (E, B, N) bool to the length of the shortest by keeping the tokens with the smallest keys.

    With independent uniform keys (E, B, N) in [0, 1) the kept tokens are a uniformly random subset.
    """
    keep, patches = shortest(context), context.shape[2]
    ranks = (keys * 2.0**40).astype(np.int64) * patches + np.arange(patches)  # the patch index breaks ties
    ranks = np.where(context, ranks, np.iinfo(np.int64).max)
    return ranks <= np.partition(ranks, keep - 1, axis=2)[:, :, keep - 1 : keep]

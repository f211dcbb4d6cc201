"""The longest masks that a configuration can draw, for measuring the step that needs most memory.

Block sizes change from step to step and contexts lose the patches that targets cover, so an ordinary step says little
about peak memory, which a run may reach only in the second epoch.
"""

from __future__ import annotations

import numpy as np
import torch

from ijepa_scale.config import MaskConfig
from ijepa_scale.masks import DenseMasks, Masks, MaskSampler, pack
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.planning.tokens import Tokens, draw_masks

KINDS = ("possible", "drawn")


def longest(kind: str, config: MaskConfig, grid: tuple[int, int], *, batch_size: int, seed: int) -> Lengths:
    """Returns the longest blocks. `kind` is `possible`, a bound of every draw, or `drawn`, for 32 drawn steps."""
    if kind == "possible":
        return MaskSampler(config, grid, seed=seed).longest()
    return longest_drawn(config, grid, batch_size, seed)


def longest_drawn(config: MaskConfig, grid: tuple[int, int], batch_size: int, seed: int) -> Lengths:
    """Returns the longest context and the longest target of 32 drawn steps; later steps may exceed them."""
    contexts, targets = [], []
    for draw in draw_masks(config, grid, batch_size=batch_size, seed=seed):
        if isinstance(draw.masks, DenseMasks):
            contexts.append(draw.masks.context.shape[2])
            targets.append(draw.masks.targets.shape[2])
        else:
            contexts.append(draw.masks.context_layout.longest)
            targets.append(draw.masks.target_layout.longest)
    return Lengths(context=max(contexts), target=max(targets))


def worst_masks(config: MaskConfig, num_patches: int, lengths: Lengths, *, count: int, dense: bool) -> Masks:
    """Returns masks of `count` images whose blocks all have these lengths, on the CPU.

    Targets are disjoint as far as the grid has room, so that as many patches as possible are wanted.
    """
    blocks = [
        np.sort((block * lengths.target + np.arange(lengths.target)) % num_patches)
        for block in range(config.num_target_blocks)
    ]
    targets = torch.from_numpy(np.stack(blocks))[:, None].repeat(1, count, 1)
    context = torch.arange(lengths.context).expand(config.num_context_blocks, count, -1).contiguous()
    masks = DenseMasks(context, targets)
    return masks if dense else pack(masks, num_patches)


def worst_tokens(config: MaskConfig, num_patches: int, lengths: Lengths, *, images: int) -> Tokens:
    """Returns the numbers of tokens of a micro-batch with the masks of `worst_masks`, for the plan."""
    context = images * config.num_context_blocks * lengths.context
    predicted = images * config.num_context_blocks * config.num_target_blocks * lengths.target
    return Tokens(
        images=images,
        patches=num_patches,
        context=context,
        predicted=predicted,
        predictor=config.num_target_blocks * context + predicted,
        wanted=min(num_patches, config.num_target_blocks * lengths.target),
        packed=config.context == "packed" or config.group_size % images != 0,
    )


class ProbeMasks(MaskSampler):
    """Draws masks as in training before step `worst_from`, and returns the longest masks from then on."""

    def __init__(self, sampler: MaskSampler, lengths: Lengths, *, worst_from: int) -> None:
        super().__init__(sampler.config, sampler.grid, seed=sampler.seed)
        self._lengths, self._worst_from = lengths, worst_from

    def __call__(self, step: int, first: int, count: int, batch_size: int) -> Masks:
        """Returns the masks of images `first` to `first + count - 1` of a step, in the same layout as drawn ones."""
        if step < self._worst_from:
            return super().__call__(step, first, count, batch_size)
        size = self.config.group_size
        dense = self.config.context == "truncate" and first // size == (first + count - 1) // size
        patches = self.grid[0] * self.grid[1]
        return worst_masks(self.config, patches, self._lengths, count=count, dense=dense)

"""The longest masks that a configuration can draw, for the step that must not run out of memory.

Block sizes change from step to step and contexts lose what the targets cover, so an ordinary step says little
about the memory of the dearest one, which may come in the second epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ijepa_scale.config import BlockMaskConfig, MaskConfig
from ijepa_scale.masks import DenseMasks, Masks, MaskSampler, pack
from ijepa_scale.masks.block_sizes import possible_sizes
from ijepa_scale.planning.tokens import Tokens, draw_masks

KINDS = ("possible", "drawn")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of each context block and of each target block."""

    context: int
    target: int


def longest(kind: str, config: MaskConfig, grid: tuple[int, int], *, batch_size: int, seed: int) -> Lengths:
    """Returns the longest blocks: `possible` bounds every draw there is, `drawn` is that of 32 drawn steps."""
    return longest_possible(config, grid) if kind == "possible" else longest_drawn(config, grid, batch_size, seed)


def longest_possible(config: MaskConfig, grid: tuple[int, int]) -> Lengths:
    """Returns lengths that no draw exceeds, whatever seed, step and place.

    A context is longest where all its targets lie on one another and as far outside of it as they can. All images
    of a micro-batch at once will hardly come to that, so memory measured with it is an upper bound.
    """
    assert isinstance(config, BlockMaskConfig), f"no blocks in {config}"
    sizes = possible_sizes(config, grid)
    margin = 1 if config.sampler == "reference" else 0  # the last row and column are never used
    rows, columns = grid[0] - margin, grid[1] - margin
    most = 0
    for context in sizes.contexts:
        area = context[0] * context[1]
        for target in sizes.targets:
            least = max(0, context[0] + target[0] - rows) * max(0, context[1] + target[1] - columns)
            covered = min(context[0], target[0]) * min(context[1], target[1])
            # where one target may leave too little, the sampler leaves the targets in the context
            whole = config.allow_overlap or area - covered <= config.min_keep
            most = max(most, area if whole else area - least)
    return Lengths(context=most, target=sizes.target_tokens[1])


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

    Targets lie beside one another as far as there is room, so that as many places as possible are wanted.
    """
    places = [
        np.sort((block * lengths.target + np.arange(lengths.target)) % num_patches)
        for block in range(config.num_target_blocks)
    ]
    targets = torch.from_numpy(np.stack(places))[:, None].repeat(1, count, 1)
    context = torch.arange(lengths.context).expand(config.num_context_blocks, count, -1).contiguous()
    masks = DenseMasks(context, targets)
    return masks if dense else pack(masks, num_patches)


def worst_tokens(config: MaskConfig, num_patches: int, lengths: Lengths, *, images: int) -> Tokens:
    """Returns the tokens of a micro-batch of such masks, for the plan."""
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
    """Draws as training does before step `worst_from`, and the longest masks from then on."""

    def __init__(self, sampler: MaskSampler, lengths: Lengths, *, worst_from: int) -> None:
        super().__init__(sampler.config, sampler.grid, seed=sampler.seed)
        self._lengths, self._worst_from = lengths, worst_from

    def __call__(self, step: int, first: int, count: int, batch_size: int) -> Masks:
        """Returns the masks of these places at a step, laid out as drawn ones are."""
        if step < self._worst_from:
            return super().__call__(step, first, count, batch_size)
        size = self.config.group_size
        dense = self.config.context == "truncate" and first // size == (first + count - 1) // size
        patches = self.grid[0] * self.grid[1]
        return worst_masks(self.config, patches, self._lengths, count=count, dense=dense)

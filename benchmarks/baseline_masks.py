"""The baseline of the mask benchmarks: one image after another, as most would write the published draw.

Written from the method's description: a loop over images and blocks with two `torch.randint` each, every block
painted into a grid of its own and turned into indices, contexts masked by the complements of all targets, and a
cut to the shortest in the collation. Given the same generator it draws the numbers of our `reference` sampler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks
from ijepa_scale.masks.block_sizes import check

PATIENCE = 20  # failed places after which one target fewer is taken out of the context


class LoopMasks:
    """Draws the masks of a batch image by image.

    Raises:
        ConfigError: the configuration can't be satisfied on the grid.
    """

    def __init__(self, config: BlockMaskConfig, grid: tuple[int, int]) -> None:
        check(config, grid)  # or the loop might not end
        self.config, self.grid = config, grid

    def __call__(self, step: int, count: int, generator: torch.Generator) -> DenseMasks:
        """Returns the masks of `count` images, truncated; block sizes go with `step`, places with `generator`."""
        config = self.config
        sizes = torch.Generator().manual_seed(step)
        target_size = self._size(config.target_scale, config.target_aspect, sizes)
        context_size = self._size(config.context_scale, (1.0, 1.0), sizes)
        contexts: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        shortest_context = shortest_target = self.grid[0] * self.grid[1]
        for _ in range(count):
            mine, complements = [], []
            for _ in range(config.num_target_blocks):
                places, complement = self._block(target_size, None, generator)
                mine.append(places)
                complements.append(complement)
                shortest_target = min(shortest_target, len(places))
            targets.append(mine)
            kept = []
            for _ in range(config.num_context_blocks):
                places, _ = self._block(context_size, [] if config.allow_overlap else complements, generator)
                kept.append(places)
                shortest_context = min(shortest_context, len(places))
            contexts.append(kept)
        return DenseMasks(self._collate(contexts, shortest_context), self._collate(targets, shortest_target))

    def _size(
        self, scale: tuple[float, float], aspect: tuple[float, float], generator: torch.Generator
    ) -> tuple[int, int]:
        """Returns (height, width) of a block: one number gives scale and aspect."""
        draw = torch.rand(1, generator=generator).item()
        area = int(self.grid[0] * self.grid[1] * (scale[0] + draw * (scale[1] - scale[0])))
        ratio = aspect[0] + draw * (aspect[1] - aspect[0])
        height, width = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
        while height >= self.grid[0]:
            height -= 1
        while width >= self.grid[1]:
            width -= 1
        return height, width

    def _block(
        self, size: tuple[int, int], allowed: list[Tensor] | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns the places (K,) of one block within all `allowed` grids, and the grid without the block."""
        failures = 0
        while True:
            top = torch.randint(0, self.grid[0] - size[0], (1,), generator=generator)
            left = torch.randint(0, self.grid[1] - size[1], (1,), generator=generator)
            inside = torch.zeros(self.grid, dtype=torch.bool)
            inside[top : top + size[0], left : left + size[1]] = True
            if allowed is not None:
                for grid in allowed[: max(0, len(allowed) - failures // PATIENCE)]:
                    inside &= grid
            places = torch.nonzero(inside.flatten()).squeeze(1)
            if len(places) > self.config.min_keep:
                break
            failures += 1
        outside = torch.ones(self.grid, dtype=torch.bool)
        outside[top : top + size[0], left : left + size[1]] = False
        return places, outside

    @staticmethod
    def _collate(places: list[list[Tensor]], length: int) -> Tensor:
        """Returns (blocks, images, length): the first `length` places of each."""
        return torch.stack(
            [torch.stack([image[block][:length] for image in places]) for block in range(len(places[0]))]
        )

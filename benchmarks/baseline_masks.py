"""The baseline of the mask benchmarks: draws masks image by image, as most people would write the published method.

Written from the method's description. A loop over images and blocks calls `torch.randint` twice for each, paints every
block into its own grid and converts it to indices. Contexts are masked by the complements of all targets, and collation
cuts all masks to the shortest. With the same generator it draws the same numbers as our `reference` sampler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MaskSampler

PATIENCE = 20  # after this many failed draws, one target fewer is excluded from the context


class LoopMasks:
    """Draws the masks of a batch image by image.

    Raises:
        ConfigError: the configuration can't be satisfied on the grid.
    """

    def __init__(self, config: BlockMaskConfig, grid: tuple[int, int]) -> None:
        MaskSampler(config, grid, seed=0)  # refuses what can't be drawn: the loop would never end
        self.config, self.grid = config, grid

    def __call__(self, step: int, count: int, generator: torch.Generator) -> DenseMasks:
        """Returns the truncated masks of `count` images; sizes are drawn by `step`, positions by `generator`."""
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
                patches, complement = self._block(target_size, None, generator)
                mine.append(patches)
                complements.append(complement)
                shortest_target = min(shortest_target, len(patches))
            targets.append(mine)
            kept = []
            for _ in range(config.num_context_blocks):
                patches, _ = self._block(context_size, [] if config.allow_overlap else complements, generator)
                kept.append(patches)
                shortest_context = min(shortest_context, len(patches))
            contexts.append(kept)
        return DenseMasks(self._collate(contexts, shortest_context), self._collate(targets, shortest_target))

    def _size(
        self, scale: tuple[float, float], aspect: tuple[float, float], generator: torch.Generator
    ) -> tuple[int, int]:
        """Returns (height, width) of a block; one random number sets both scale and aspect."""
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
        """Returns the patch indices (K,) of one block within all `allowed` grids, and the grid without the block."""
        failures = 0
        while True:
            top = torch.randint(0, self.grid[0] - size[0], (1,), generator=generator)
            left = torch.randint(0, self.grid[1] - size[1], (1,), generator=generator)
            inside = torch.zeros(self.grid, dtype=torch.bool)
            inside[top : top + size[0], left : left + size[1]] = True
            if allowed is not None:
                for grid in allowed[: max(0, len(allowed) - failures // PATIENCE)]:
                    inside &= grid
            patches = torch.nonzero(inside.flatten()).squeeze(1)
            if len(patches) > self.config.min_keep:
                break
            failures += 1
        outside = torch.ones(self.grid, dtype=torch.bool)
        outside[top : top + size[0], left : left + size[1]] = False
        return patches, outside

    @staticmethod
    def _collate(patches: list[list[Tensor]], length: int) -> Tensor:
        """Returns (blocks, images, length): the first `length` patch indices of each block."""
        return torch.stack(
            [torch.stack([image[block][:length] for image in patches]) for block in range(len(patches[0]))]
        )

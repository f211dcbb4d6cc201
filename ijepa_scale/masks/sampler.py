"""Masks of any part of a global batch as a function of (seed, step, place).

Groups of `group_size` consecutive places share block sizes and one cut. A group is always sampled
whole, so an image's masks can't depend on processes, accumulation or micro-batches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from ijepa_scale import rng
from ijepa_scale.config.schema import BlockMaskConfig, MaskConfig
from ijepa_scale.masks.block_sizes import check
from ijepa_scale.masks.group import GroupMasks
from ijepa_scale.masks.multiblock import sample_multiblock
from ijepa_scale.masks.packing import pack_groups
from ijepa_scale.masks.reference import sample_reference
from ijepa_scale.masks.types import Masks

_GROUPS_KEPT = 4  # micro-batches of one group follow one another; a few more for prefetching


class MaskSampler:
    """Draws masks on the host; the same for every process that asks for the same places.

    `sampler: reference` seeds block sizes with the step alone, as published: every group of a step
    has the sizes that every process of a published run had, whatever the seed; its places come from
    a generator keyed by (seed, step, group).
    """

    def __init__(self, config: MaskConfig, grid: tuple[int, int], *, seed: int) -> None:
        """Checks that the configuration can be satisfied.

        Raises:
            ConfigError: it can't, on this grid of (height, width) patches; with numbers and remedies.
        """
        assert isinstance(config, BlockMaskConfig), f"no blocks in {config}"
        self.config = config
        self.grid = (int(grid[0]), int(grid[1]))
        self.seed = seed
        self.sizes = check(config, self.grid)  # bounds of tokens per block, for planning and constant buffers
        self._groups: OrderedDict[tuple[int, int, int], GroupMasks] = OrderedDict()
        self._lock = threading.Lock()  # masks are drawn ahead on another thread

    def __call__(self, step: int, first: int, count: int, batch_size: int) -> Masks:
        """Returns the masks of the images at places [first, first + count) of the global batch of `step`.

        `DenseMasks` where contexts are truncated and the places lie in one group, else `PackedMasks`; CPU
        tensors either way.

        Raises:
            ValueError: the places don't lie in [0, batch_size).
        """
        if not (0 <= first and 1 <= count and first + count <= batch_size):
            raise ValueError(
                f"places [{first}, {first + count}) are not a part of a batch of {batch_size}; "
                "give first >= 0, count >= 1 and first + count <= batch_size"
            )
        size = self.config.group_size
        parts = []
        for group in range(first // size, (first + count - 1) // size + 1):
            start = group * size
            with self._lock:
                masks = self._group(step, group, min(size, batch_size - start))
            parts.append(masks.rows(max(0, first - start), first + count - start))
        if self.config.context == "truncate" and len(parts) == 1:
            return parts[0].dense()
        return pack_groups(parts)

    def _group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group, from the last few groups or sampled."""
        index = (step, group, count)
        masks = self._groups.get(index)
        if masks is None:
            masks = self._sample(step, group, count)
            self._groups[index] = masks
            while len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return masks

    def _sample(self, step: int, group: int, count: int) -> GroupMasks:
        if self.config.sampler == "reference":
            generator = rng.generator(self.seed, "mask-reference", step, group)
            return sample_reference(self.config, self.grid, step=step, count=count, generator=generator)
        places = group * self.config.group_size + np.arange(count)
        return sample_multiblock(self.config, self.grid, seed=self.seed, step=step, group=group, places=places)

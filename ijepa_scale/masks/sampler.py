"""Masks of any part of a global batch as a function of (seed, step, position).

Groups of `group_size` consecutive images share block sizes and one cut. A group is always drawn as a whole, so an
image's masks don't depend on the number of processes, accumulation or micro-batches, which this module must not know.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from ijepa_scale.config.schema import MaskConfig
from ijepa_scale.masks.draw import Lengths, MaskDraw
from ijepa_scale.masks.group import GroupMasks
from ijepa_scale.masks.packing import pack_groups
from ijepa_scale.masks.types import Masks
from ijepa_scale.registry import SAMPLERS

_GROUPS_KEPT = 4  # consecutive micro-batches share a group; a few more for drawing ahead


class MaskSampler:
    """Draws masks on the host with the draw that `config.sampler` names. Every process gets the same masks."""

    def __init__(self, config: MaskConfig, grid: tuple[int, int], *, seed: int) -> None:
        """Checks that the configuration works on a grid of (height, width) patches.

        Raises:
            ConfigError: it doesn't; the message gives numbers and remedies.
        """
        self.config = config
        self.grid = (int(grid[0]), int(grid[1]))
        self.seed = seed
        self.draw: MaskDraw = SAMPLERS.get(config.sampler)(config, self.grid, seed=seed)
        self._groups: OrderedDict[tuple[int, int, int], GroupMasks] = OrderedDict()
        self._lock = threading.Lock()  # `MasksAhead` calls from another thread too

    def __call__(self, step: int, first: int, count: int, batch_size: int) -> Masks:
        """Returns the masks of the images [first, first + count) of the global batch of `step`, on the CPU.

        They are `DenseMasks` if contexts are truncated and all images belong to one group, else `PackedMasks`.

        Raises:
            ValueError: an image is outside [0, batch_size).
        """
        if not (0 <= first and 1 <= count and first + count <= batch_size):
            raise ValueError(
                f"images [{first}, {first + count}) are not part of a batch of {batch_size}; "
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

    def longest(self) -> Lengths:
        """Returns upper bounds on the lengths of context and target blocks."""
        return self.draw.longest()

    def _group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group, from the cache or newly drawn."""
        index = (step, group, count)
        masks = self._groups.get(index)
        if masks is None:
            masks = self._groups[index] = self.draw.group(step, group, count)
            while len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return masks

"""The mask draw of random patches instead of blocks: the ablation of arXiv 2301.08243, table 6."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ijepa_scale import rng
from ijepa_scale.config.form import Fraction
from ijepa_scale.config.schema import MaskConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.masks.group import GroupMasks


class RandomMaskConfig(MaskConfig):
    """Random sets of patches as targets, and a random set of the other patches as context."""

    sampler: str = Field("random", description="Draw of the masks.")
    context_ratio: Fraction = Field(0.4, description="Share of the grid that is context.")
    target_ratio: Fraction = Field(0.15, description="Share of the grid that each target covers.")


class RandomDraw:
    """The sampler `random`. Targets of an image may overlap, as blocks do; a context never holds a target's patch."""

    Config = RandomMaskConfig

    def __init__(self, config: RandomMaskConfig, grid: tuple[int, int], *, seed: int) -> None:
        self._config, self._seed = config, seed
        self._patches = grid[0] * grid[1]
        self._target = round(config.target_ratio * self._patches)
        self._context = round(config.context_ratio * self._patches)
        room = self._patches - config.num_target_blocks * self._target
        few = min(self._target, self._context)
        if few <= config.min_keep:
            raise ConfigError(
                f"masks.min_keep is {config.min_keep}, but of {self._patches} patches a target holds {self._target} "
                f"and the context {self._context}, and each must hold more than min_keep; lower masks.min_keep, or "
                "raise masks.target_ratio or masks.context_ratio"
            )
        if self._context > room:
            raise ConfigError(
                f"masks.context_ratio {config.context_ratio:g} needs {self._context} patches, but "
                f"{config.num_target_blocks} targets of {self._target} may leave only {room} of {self._patches}; "
                "lower masks.context_ratio, masks.target_ratio or masks.num_target_blocks"
            )

    def longest(self) -> Lengths:
        """Returns the lengths of context and target blocks, which are the same in every draw."""
        return Lengths(context=self._context, target=self._target)

    def group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group."""
        config, patches = self._config, self._patches
        positions = group * config.group_size + np.arange(count)
        blocks = config.num_target_blocks + config.num_context_blocks
        keys = rng.uniform(self._seed, "mask-random", step, positions, blocks * patches)
        keys = keys.reshape(count, blocks, patches).swapaxes(0, 1)
        order = keys[: config.num_target_blocks].argsort(axis=2, kind="stable")
        targets = np.sort(order[:, :, : self._target], axis=2)
        taken = np.zeros((count, patches), dtype=bool)
        np.put_along_axis(taken, targets.swapaxes(0, 1).reshape(count, -1), True, axis=1)
        left = np.where(taken, np.inf, keys[config.num_target_blocks :])
        chosen = left.argsort(axis=2, kind="stable")[:, :, : self._context]
        context = np.zeros((config.num_context_blocks, count, patches), dtype=bool)
        np.put_along_axis(context, chosen, True, axis=2)
        return GroupMasks(context, targets.astype(np.int64))

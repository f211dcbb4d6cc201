"""Defines the protocol of mask draws, which `MaskSampler` calls. Must not know batches or processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ijepa_scale.masks.group import GroupMasks


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The number of tokens in each context block and in each target block."""

    context: int
    target: int


class MaskDraw(Protocol):
    """Draws the masks of whole groups as a function of (seed, step, position in the global batch)."""

    Config: ClassVar[type[Any]]  # the section `masks` for this sampler

    def __init__(self, config: Any, grid: tuple[int, int], *, seed: int) -> None:
        """Checks that the section works on a grid of (height, width) patches.

        Raises:
            ConfigError: it doesn't; the message gives numbers and remedies.
        """

    def group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group, cut to one length if `config.context` is truncate.

        All target blocks of a group have the same length. Image i of the group is at position group * group_size + i of
        the global batch.
        """

    def longest(self) -> Lengths:
        """Returns upper bounds on the lengths for any seed, step and position, for planning memory and buffers."""

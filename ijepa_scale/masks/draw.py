"""What the mask sampler asks of a way to draw masks. Knows no batch and no process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ijepa_scale.masks.group import GroupMasks


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of each context block and of each target block."""

    context: int
    target: int


class MaskDraw(Protocol):
    """Draws the masks of whole groups as a function of (seed, step, position in the global batch)."""

    Config: ClassVar[type[Any]]  # the section `masks` for this sampler

    def __init__(self, config: Any, grid: tuple[int, int], *, seed: int) -> None:
        """Takes its section and the grid, (height, width) in patches.

        Raises:
            ConfigError: the section can't be satisfied on this grid; with numbers and remedies.
        """

    def group(self, step: int, group: int, count: int) -> GroupMasks:
        """Returns the masks of all `count` images of a group, cut to one length if `config.context` is truncate.

        All target blocks of a group have the same length. Image i has position group * group_size + i in the batch.
        """

    def longest(self) -> Lengths:
        """Returns lengths that no draw exceeds, whatever seed, step and position: for memory and constant buffers."""

"""Computes the possible sizes of mask blocks and the longest masks, and rejects configurations that can't work.

Knows the patch grid and the section `masks`, but must not know positions, images or steps. A size is (height, width)
in patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ijepa_scale.config.schema import BlockMaskConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks.draw import Lengths

Size = tuple[int, int]
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """The part of the size rule that differs between samplers."""

    sides: Callable[[Size, int, float], Size]  # (grid, patches, height / width) -> size
    unused: int  # number of bottom rows and of right columns that blocks never reach
    coupled: bool  # one random number sets both scale and aspect of a block
    context_aspect: Callable[[Size], float]  # grid -> height / width of context blocks


def size_of(rule: BlockRule, grid: Size, scale: Interval, aspect: Interval, draws: tuple[float, float]) -> Size:
    """Returns the block size for two numbers in [0, 1], which interpolate within `scale` and within `aspect`."""
    return rule.sides(grid, int(grid[0] * grid[1] * _between(scale, draws[0])), _between(aspect, draws[1]))


def context_size(rule: BlockRule, grid: Size, scale: Interval, draw: float) -> Size:
    """Returns the size of a context block; the rule sets its aspect."""
    aspect = rule.context_aspect(grid)
    return size_of(rule, grid, scale, (aspect, aspect), (draw, draw))


@dataclass(frozen=True)
class PossibleSizes:
    """All block sizes that a configuration can draw on a grid."""

    targets: frozenset[Size]
    contexts: frozenset[Size]

    @property
    def target_tokens(self) -> tuple[int, int]:
        """The smallest and largest number of patches in a target block."""
        return _areas(self.targets)

    @property
    def context_tokens(self) -> tuple[int, int]:
        """The smallest and largest number of patches in a context block, before targets are removed from it."""
        return _areas(self.contexts)


def possible_sizes(config: BlockMaskConfig, grid: Size, rule: BlockRule) -> PossibleSizes:
    """Returns the block sizes that can be drawn, by testing every point where rounding changes a side."""
    aspect = rule.context_aspect(grid)
    return PossibleSizes(
        targets=_sizes(rule, grid, config.target_scale, config.target_aspect),
        contexts=_sizes(rule, grid, config.context_scale, (aspect, aspect)),
    )


def longest_blocks(config: BlockMaskConfig, grid: Size, sizes: PossibleSizes, rule: BlockRule) -> Lengths:
    """Returns upper bounds on the lengths of blocks of these sizes.

    A context is longest when all its targets overlap one another and reach as far outside it as possible. A
    micro-batch almost never holds only such images, so memory measured with them is an upper bound.
    """
    rows, columns = grid[0] - rule.unused, grid[1] - rule.unused
    most = 0
    for context in sizes.contexts:
        area = context[0] * context[1]
        for target in sizes.targets:
            least = max(0, context[0] + target[0] - rows) * max(0, context[1] + target[1] - columns)
            covered = min(context[0], target[0]) * min(context[1], target[1])
            # when one target may leave too few patches, the sampler keeps the targets in the context
            whole = config.allow_overlap or area - covered <= config.min_keep
            most = max(most, area if whole else area - least)
    return Lengths(context=most, target=sizes.target_tokens[1])


def check(config: BlockMaskConfig, grid: Size, rule: BlockRule) -> PossibleSizes:
    """Checks a configuration, and returns its possible sizes.

    Raises:
        ConfigError: sampling could loop forever or break `min_keep`. The message lists all problems with remedies.
    """
    if min(grid) < 1:
        raise ConfigError(f"the patch grid is {_text(grid)}; masks need at least 1x1: raise model.image_size")
    sizes = possible_sizes(config, grid, rule)
    problems = [
        _too_small(config, grid, rule, kind, found)
        for kind, found in (("target", sizes.targets), ("context", sizes.contexts))
        if _areas(found)[0] <= config.min_keep
    ]
    if not problems and not config.allow_overlap:
        problems = _swallowed(config, grid, sizes, rule)
    if problems:
        raise ConfigError(*problems)
    return sizes


def _between(interval: Interval, draw: float) -> float:
    return interval[0] + draw * (interval[1] - interval[0])


def _sizes(rule: BlockRule, grid: Size, scale: Interval, aspect: Interval) -> frozenset[Size]:
    patches = grid[0] * grid[1]
    found: set[Size] = set()
    for area in range(int(patches * scale[0]), int(patches * scale[1]) + 1):
        low, high = aspect
        if rule.coupled and scale[1] > scale[0]:  # each area allows only part of the aspects
            span = patches * (scale[1] - scale[0])
            low = _between(aspect, max(0.0, (area - patches * scale[0]) / span))
            high = _between(aspect, min(1.0, (area + 1 - patches * scale[0]) / span))
        found.update(rule.sides(grid, area, value) for value in _aspects(area, low, high, max(grid)))
    return frozenset(found)


def _aspects(area: int, low: float, high: float, longest: int) -> list[float]:
    """Returns aspects in [low, high] that produce every possible rounding of both sides, up to `longest`."""
    halves = (np.arange(longest + 1) + 0.5) ** 2  # rounding changes at n + 1/2
    breaks = np.concatenate([halves / max(area, 1), area / halves])
    bounds = np.unique(np.concatenate([breaks[(breaks > low) & (breaks < high)], [low, high]]))
    return [float(value) for value in np.concatenate([bounds, (bounds[1:] + bounds[:-1]) / 2])]


def _areas(sizes: frozenset[Size]) -> tuple[int, int]:
    areas = [height * width for height, width in sizes]
    return min(areas), max(areas)


def _too_small(config: BlockMaskConfig, grid: Size, rule: BlockRule, kind: str, sizes: frozenset[Size]) -> str:
    low, high = _areas(sizes)
    scale = config.target_scale if kind == "target" else config.context_scale
    remedies = [f"raise masks.{kind}_scale or model.image_size"]
    if rule.unused and min(grid) == 1:
        remedies = [f"the {config.sampler} sampler never uses the last row and column: set masks.sampler: multiblock"]
    elif low > 0:
        remedies.insert(0, f"set masks.min_keep: {max(keep for keep in (10, 3, 0) if keep < low)}")
    return (
        f"masks.min_keep is {config.min_keep}, but {kind} blocks on a grid of {_text(grid)} patches hold "
        f"{low} to {high} (masks.{kind}_scale {scale[0]:g} to {scale[1]:g}) and each must hold more than min_keep; "
        + ", or ".join(remedies)
    )


def _swallowed(config: BlockMaskConfig, grid: Size, sizes: PossibleSizes, rule: BlockRule) -> list[str]:
    """Returns the problem if some target leaves too few patches of some context block, whatever their positions."""
    rows, columns = grid[0] - rule.unused, grid[1] - rule.unused
    kept, context, target = min(
        (c[0] * c[1] - max(0, c[0] + t[0] - rows) * max(0, c[1] + t[1] - columns), c, t)
        for c in sizes.contexts
        for t in sizes.targets
    )
    if kept > config.min_keep:
        return []
    return [
        f"a context block of {_text(context)} patches without a target block of {_text(target)} keeps at most {kept} "
        f"on a grid of {_text(grid)}, but must keep more than masks.min_keep, which is {config.min_keep}; "
        f"lower masks.target_scale (currently up to {config.target_scale[1]:g}), raise masks.context_scale "
        f"(currently from {config.context_scale[0]:g}), or set masks.allow_overlap: true"
    ]


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"

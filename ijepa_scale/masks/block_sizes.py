"""Sizes of mask blocks: how they are drawn, which ones are possible, which configurations can't work.

Knows the patch grid and `BlockMaskConfig`; nothing of places, images or steps. A size is (height, width) in patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ijepa_scale.config.schema import BlockMaskConfig
from ijepa_scale.errors import ConfigError

Size = tuple[int, int]
Interval = tuple[float, float]


def reference_size(grid: Size, scale: Interval, aspect: Interval, draw: float) -> Size:
    """Returns the block size of the published draw: `draw` in [0, 1] gives scale and aspect both.

    A side is always shorter than the grid's (so it can be 0 on a grid one patch wide).
    Source: released I-JEPA code (arXiv 2301.08243), multi-block mask collator.
    """
    area = int(grid[0] * grid[1] * _between(scale, draw))
    return _shorter_sides(grid, area, _between(aspect, draw))


def multiblock_size(grid: Size, scale: Interval, aspect: Interval, draws: tuple[float, float]) -> Size:
    """Returns a block size whose scale and aspect come from two independent draws in [0, 1].

    A side is at most the grid's; where one is cut, the other grows so that the area stays.
    # differs from the reference: one number for scale and aspect makes every small block wide and every big one tall
    """
    area = int(grid[0] * grid[1] * _between(scale, draws[0]))
    return _fitted_sides(grid, area, _between(aspect, draws[1]))


def context_aspect(config: BlockMaskConfig, grid: Size) -> Interval:
    """Returns the aspect of context blocks as an interval of one value.

    It is 1 in the reference; `multiblock` takes the grid's own height / width, so that a context block
    of scale 1 is the whole image on grids that aren't square too.
    """
    value = 1.0 if config.sampler == "reference" else grid[0] / grid[1]
    return value, value


@dataclass(frozen=True)
class PossibleSizes:
    """Every block size that a configuration can draw on a grid."""

    targets: frozenset[Size]
    contexts: frozenset[Size]

    @property
    def target_tokens(self) -> tuple[int, int]:
        """Fewest and most patches of a target block."""
        return _areas(self.targets)

    @property
    def context_tokens(self) -> tuple[int, int]:
        """Fewest and most patches of a context block, before targets are taken out of it."""
        return _areas(self.contexts)


def possible_sizes(config: BlockMaskConfig, grid: Size) -> PossibleSizes:
    """Returns the block sizes that can be drawn, found at every point where rounding changes one."""
    return PossibleSizes(
        targets=_sizes(config, grid, config.target_scale, config.target_aspect),
        contexts=_sizes(config, grid, config.context_scale, context_aspect(config, grid)),
    )


def check(config: BlockMaskConfig, grid: Size) -> PossibleSizes:
    """Returns the possible sizes of a configuration that can be satisfied.

    Raises:
        ConfigError: sampling could loop for ever or break `min_keep`; all problems, with remedies.
    """
    if min(grid) < 1:
        raise ConfigError(f"the patch grid is {_text(grid)}; masks need at least 1x1: raise model.image_size")
    sizes = possible_sizes(config, grid)
    problems = [
        _too_small(config, grid, kind, found)
        for kind, found in (("target", sizes.targets), ("context", sizes.contexts))
        if _areas(found)[0] <= config.min_keep
    ]
    if not problems and not config.allow_overlap:
        problems = _swallowed(config, grid, sizes)
    if problems:
        raise ConfigError("\n".join(problems))
    return sizes


def _between(interval: Interval, draw: float) -> float:
    return interval[0] + draw * (interval[1] - interval[0])


def _shorter_sides(grid: Size, area: int, aspect: float) -> Size:
    height, width = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def _fitted_sides(grid: Size, area: int, aspect: float) -> Size:
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height > grid[0]:
        height, width = grid[0], round(area / grid[0])
    elif width > grid[1]:
        height, width = round(area / grid[1]), grid[1]
    return min(height, grid[0]), min(width, grid[1])


def _sizes(config: BlockMaskConfig, grid: Size, scale: Interval, aspect: Interval) -> frozenset[Size]:
    sides = _shorter_sides if config.sampler == "reference" else _fitted_sides
    patches = grid[0] * grid[1]
    found: set[Size] = set()
    for area in range(int(patches * scale[0]), int(patches * scale[1]) + 1):
        low, high = aspect
        if config.sampler == "reference" and scale[1] > scale[0]:  # one draw: each area has its own part of the aspects
            span = patches * (scale[1] - scale[0])
            low = _between(aspect, max(0.0, (area - patches * scale[0]) / span))
            high = _between(aspect, min(1.0, (area + 1 - patches * scale[0]) / span))
        found.update(sides(grid, area, value) for value in _aspects(area, low, high, max(grid)))
    return frozenset(found)


def _aspects(area: int, low: float, high: float, longest: int) -> list[float]:
    """Returns aspects in [low, high] that reach every rounding of both sides up to `longest`."""
    halves = (np.arange(longest + 1) + 0.5) ** 2  # a side rounds differently on either side of n + 1/2
    breaks = np.concatenate([halves / max(area, 1), area / halves])
    bounds = np.unique(np.concatenate([breaks[(breaks > low) & (breaks < high)], [low, high]]))
    return [float(value) for value in np.concatenate([bounds, (bounds[1:] + bounds[:-1]) / 2])]


def _areas(sizes: frozenset[Size]) -> tuple[int, int]:
    areas = [height * width for height, width in sizes]
    return min(areas), max(areas)


def _too_small(config: BlockMaskConfig, grid: Size, kind: str, sizes: frozenset[Size]) -> str:
    low, high = _areas(sizes)
    scale = config.target_scale if kind == "target" else config.context_scale
    remedies = [f"raise masks.{kind}_scale or model.image_size"]
    if config.sampler == "reference" and min(grid) == 1:
        remedies = ["the reference sampler never uses the last row and column: set masks.sampler: multiblock"]
    elif low > 0:
        remedies.insert(0, f"set masks.min_keep: {max(keep for keep in (10, 3, 0) if keep < low)}")
    return (
        f"masks.min_keep is {config.min_keep}, but {kind} blocks on a grid of {_text(grid)} patches hold "
        f"{low} to {high} (masks.{kind}_scale {scale[0]:g} to {scale[1]:g}) and each must hold more than min_keep; "
        + ", or ".join(remedies)
    )


def _swallowed(config: BlockMaskConfig, grid: Size, sizes: PossibleSizes) -> list[str]:
    """Returns what is wrong where some target block leaves too little of some context block wherever they lie."""
    margin = 1 if config.sampler == "reference" else 0  # the last row and column are never used
    rows, columns = grid[0] - margin, grid[1] - margin
    kept, context, target = min(
        (c[0] * c[1] - max(0, c[0] + t[0] - rows) * max(0, c[1] + t[1] - columns), c, t)
        for c in sizes.contexts
        for t in sizes.targets
    )
    if kept > config.min_keep:
        return []
    return [
        f"a context block of {_text(context)} patches without a target block of {_text(target)} keeps at most {kept} "
        f"on a grid of {_text(grid)}, wherever they lie, and masks.min_keep {config.min_keep} wants more; "
        f"lower masks.target_scale (now up to {config.target_scale[1]:g}), raise masks.context_scale "
        f"(now from {config.context_scale[0]:g}), or set masks.allow_overlap: true"
    ]


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"

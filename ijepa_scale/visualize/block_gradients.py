"""Gradient norms of all transformer blocks in one map: a line for each block, a column for each measurement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ijepa_scale.metrics.plots import new_figure
from ijepa_scale.metrics.sinks import BLOCK_NORM
from ijepa_scale.visualize.curves import RunRows, mark_alarms, style_axes, themed_svg
from ijepa_scale.visualize.sheet import Scale

_MOST_COLUMNS = 160  # more measurements are averaged
_MOST_TICKS = 16  # on the side
_COLORS, _ALARM = "viridis", "#e5173f"


@dataclass(frozen=True, kw_only=True)
class BlockNormMap:
    """The norms of a run's blocks.

    Attributes:
        blocks: their names, such as "encoder 0".
        steps: (n,) of the measurements.
        norms: (blocks, n), NaN where one wasn't measured.
    """

    blocks: list[str]
    steps: np.ndarray
    norms: np.ndarray

    def latest(self) -> dict[str, float]:
        """Returns the norms of the last measurement, by block."""
        last = {block: float(norm) for block, norm in zip(self.blocks, self.norms[:, -1], strict=True)}
        return {block: norm for block, norm in last.items() if np.isfinite(norm)}


def block_norms(run: RunRows) -> BlockNormMap | None:
    """Returns the norms of a run's blocks, or None if it has measured none."""
    fields = [field for field in run.fields() if field.startswith(BLOCK_NORM)]
    if not fields:
        return None
    points = [dict(zip(*map(np.ndarray.tolist, run.points(field)), strict=True)) for field in fields]
    steps = sorted({step for found in points for step in found})
    norms = np.array([[found.get(step, np.nan) for step in steps] for found in points])
    names = [field.removeprefix(BLOCK_NORM).replace("_", " ") for field in fields]
    return BlockNormMap(blocks=names, steps=np.array(steps), norms=norms)


def common_scale(maps: Iterable[BlockNormMap]) -> Scale:
    """Returns a logarithmic scale from the lowest to the highest norm above 0 of all maps."""
    above = np.concatenate([norms[norms > 0] for norms in (each.norms for each in maps)])
    low, high = (float(above.min()), float(above.max())) if len(above) else (1.0, 1.0)
    return Scale(colors=_COLORS, low=low, high=high, label="norm of the gradient, logarithmic; 0 is as the lowest")


def block_svg(found: BlockNormMap, run: RunRows, scale: Scale, salt: str) -> str:
    """Returns the map as SVG in the page's colours, see `themed_svg`."""
    figure = new_figure(width=4.2, height=max(2.5, 0.7 + 0.065 * len(found.blocks)))
    axes = figure.subplots()
    groups = np.array_split(np.arange(len(found.steps)), min(len(found.steps), _MOST_COLUMNS))
    logs = np.log10(found.norms.clip(scale.low, scale.high))  # keeps NaN
    columns = np.stack([_mean(logs[:, group]) for group in groups], axis=1)
    low, high = np.log10(scale.low), np.log10(scale.high)
    options = {"aspect": "auto", "interpolation": "none", "cmap": _COLORS, "vmin": low, "vmax": max(high, low + 1e-6)}
    axes.imshow(np.ma.masked_invalid(columns), **options)
    firsts = [float(found.steps[group[0]]) for group in groups]
    every = -(-len(firsts) // 5)
    axes.set_xticks(range(0, len(firsts), every), [f"{step:,.0f}" for step in firsts[::every]])
    shown = _ticks(found.blocks)
    axes.set_yticks(shown, [found.blocks[place] for place in shown])
    style_axes(axes)
    axes.grid(visible=False)
    mark_alarms(axes, run, _ALARM, places=lambda step: float(np.interp(step, firsts, range(len(firsts)))))
    return themed_svg(figure, salt)


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean (n,) of the numbers in each line of (n, m), NaN where there are none."""
    there = np.isfinite(values)
    total = np.where(there, values, 0.0).sum(axis=1)
    return np.divide(total, there.sum(axis=1), out=np.full(len(values), np.nan), where=there.any(axis=1))


def _ticks(blocks: Sequence[str]) -> list[int]:
    """Returns the lines that are named: all of few, else the first of each part and every few blocks after it."""
    every = next(n for n in (1, 2, 4, 8, 16, 32, len(blocks)) if len(blocks) <= n * _MOST_TICKS or n == len(blocks))
    numbers = [int(number) if number.isdecimal() else 0 for number in (name.rpartition(" ")[2] for name in blocks)]
    found: list[int] = []
    for place, number in enumerate(numbers):
        if number % every == 0 and (not found or place - found[-1] > every // 2):
            found.append(place)
    return found

"""A sheet of small pictures with labels, and how it is drawn as a PNG. Knows nothing of what the pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijepa_scale.metrics.plots import save_figure
from ijepa_scale.visualize.lettering import fitted, width_of, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
INK, MUTED = "#1c2128", "#59636e"  # contrast with white: 16 and 6
_SIDE, _GAP, _MARGIN = 1.45, 0.09, 0.18  # inches: height of a picture, between pictures, around all
_LEAD = 0.24  # after the first pictures of a line
_LABEL, _SCALE = 0.2, 0.42  # height of a label, and of a scale with its numbers
_TITLE, _SMALL = 11, 8  # points
_WIDEST_LABEL = 1.2  # inches, of a line's label


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture, (H, W, 3) uint8, its label, and the text that says what it shows to those who can't see it."""

    pixels: np.ndarray
    label: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the colours of a map mean: the name of matplotlib's colour map, its ends, and what is measured."""

    colors: str
    low: float
    high: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Items, each shown by the same kinds of panels.

    An item is a column if `across`, with its panels below one another; else a line, after `per_line` panels broken into
    several. The first `lead` panels of a line stand apart.
    """

    title: str
    note: str
    items: Sequence[Sequence[Panel]]
    across: bool = False
    lead: int = 1
    per_line: int = 9
    scale: Scale | None = None

    def lines(self) -> list[list[Panel]]:
        """Returns the panels as they stand on the page, line by line."""
        if self.across:
            return [[item[row] for item in self.items] for row in range(len(self.items[0]))]
        return [
            list(item[begin : begin + self.per_line])
            for item in self.items
            for begin in range(0, len(item), self.per_line)
        ]


def draw_sheet(sheet: Sheet, path: str | Path) -> Path:
    """Draws the sheet as a PNG on white, legible on light and dark pages; returns its path."""
    from matplotlib.figure import Figure  # takes 0.5 s to import, so import it only to draw a picture

    lines = sheet.lines()
    height, width = lines[0][0].pixels.shape[:2]
    wide = _SIDE * width / height
    names = [fitted(line[0].label, _SMALL, _WIDEST_LABEL) for line in lines] if sheet.across else []
    left = _MARGIN + (max(width_of(name, _SMALL) for name in names) + 0.1 if names else 0.0)
    lead = 0.0 if sheet.across or len(lines[0]) == sheet.lead else _LEAD
    columns = max(map(len, lines))
    inches_wide = max(left + columns * (wide + _GAP) + lead + _MARGIN, 5.0)
    room = inches_wide - 2 * _MARGIN
    note = wrapped(sheet.note, _SMALL, room)
    labelled = [not sheet.across and (n == 0 or _labels(lines[n]) != _labels(lines[n - 1])) for n in range(len(lines))]
    top, bottom = 0.5, 0.15 * len(note) + 0.2 + (_SCALE if sheet.scale else 0.0)
    inches_high = top + sum(_SIDE + _GAP + _LABEL * each for each in labelled) + bottom
    figure = Figure(figsize=(inches_wide, inches_high), facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / inches_wide, 1 - (y + h) / inches_high, w / inches_wide, h / inches_high))

    def write(x: float, y: float, text: str, size: float, color: str = INK, **options: object) -> None:
        at = x / inches_wide, 1 - y / inches_high
        figure.text(*at, text, fontsize=size, color=color, parse_math=False, **options)  # type: ignore[arg-type]

    write(_MARGIN, 0.12, fitted(sheet.title, _TITLE, room, bold=True), _TITLE, va="top", weight="bold")
    y = top
    for number, (line, has_labels) in enumerate(zip(lines, labelled, strict=True)):
        y += _LABEL * has_labels
        for column, panel in enumerate(line):
            x = left + column * (wide + _GAP) + (lead if column >= sheet.lead else 0.0)
            axes = place(x, y, wide, _SIDE)
            axes.imshow(panel.pixels, interpolation="lanczos" if panel.pixels.shape[0] > 150 else "nearest")
            axes.set_axis_off()
            if has_labels:
                label = fitted(panel.label, _SMALL, wide)
                write(x + wide / 2, y - 0.05, label, _SMALL, MUTED, ha="center", va="bottom")
        if names:
            write(left - 0.1, y + _SIDE / 2, names[number], _SMALL, MUTED, ha="right", va="center")
        y += _SIDE + _GAP
    y += 0.05
    if sheet.scale:
        _draw_scale(sheet.scale, place(left, y + 0.02, 2.0, 0.1))
        y += _SCALE
    write(_MARGIN, y, "\n".join(note), _SMALL, MUTED, va="top", linespacing=1.35)
    return save_figure(figure, path)


def _labels(line: Sequence[Panel]) -> list[str]:
    return [panel.label for panel in line]


def _draw_scale(scale: Scale, axes: Axes) -> None:
    ramp = np.linspace(0, 1, 256)[None]
    axes.imshow(ramp, aspect="auto", cmap=scale.colors, extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    low, high = f"{scale.low:.3g}", f"{scale.high:.3g}"
    for x, y, text, side in ((0, -0.6, low, "left"), (1, -0.6, high, "right"), (1.06, 1.2, scale.label, "left")):
        axes.text(
            x, y, text, transform=axes.transAxes, fontsize=_SMALL, color=MUTED, ha=side, va="top", parse_math=False
        )


def as_bytes(image: np.ndarray) -> np.ndarray:
    """Returns floats in [0, 1] as uint8, rounded."""
    return (image.clip(0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray, scale: Scale, strength: float = 0.65) -> np.ndarray:
    """Returns an image (h, w, 3) in [0, 1], greyed, under the colours of `values` (h, w); NaN shows the grey alone."""
    from matplotlib import colormaps

    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    share = (values - scale.low) / max(scale.high - scale.low, 1e-12)
    colors = colormaps[scale.colors](np.nan_to_num(share).clip(0, 1))[..., :3]
    weight = np.where(np.isnan(values), 0.0, strength)[..., None]
    return as_bytes(grey * (1 - weight) + colors * weight)

"""Curves of several runs in one plot: which there are, and how they are drawn. Must not know how runs are made."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ijepa_scale.errors import DataError
from ijepa_scale.metrics.plots import new_figure, save_figure
from ijepa_scale.metrics.sinks import JSONL_NAME
from ijepa_scale.metrics.stored_rows import is_number, read_rows
from ijepa_scale.nearest import unknown
from ijepa_scale.visualize.lettering import fitted, width_of
from ijepa_scale.visualize.published_logs import read_published_log
from ijepa_scale.visualize.sheet import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Each has a contrast of at least 3 with white and with the report's dark page.
RUN_COLORS = ("#2f7fd6", "#d1601f", "#2a9763", "#a855b5", "#9a7b12", "#1192a3", "#d1466f", "#7a7f87")
_DASHES = ("-", "--", ":", "-.")  # further runs repeat the colours
_TITLES = {
    "loss": "Loss", "eval_loss": "Held-out loss", "knn": "kNN accuracy, %", "top1": "Top-1 accuracy, %",
    "top5": "Top-5 accuracy, %", "best_top1": "Best top-1 accuracy, %",
    "target_std": "Spread of the target's features", "grad_norm": "Gradient norm",
    "lr": "Learning rate", "weight_decay": "Weight decay", "momentum": "Momentum of the target",
    "step_ms": "Step time, ms", "images_per_s": "Images per second", "data_wait_ms": "Data wait, ms per step",
    "mfu": "Share of the peak FLOP/s, %", "peak_bytes": "Peak memory, GB", "context_tokens": "Context tokens per image",
    "target_tokens": "Tokens per target block", "linear": "Linear probe, %", "rank_me": "RankMe", "lidar": "LiDAR",
    "feature_std": "Spread on the health images", "relative_loss": "Loss / that of the mean",
    "health_loss": "Health loss", "context_cosine": "Cosine of context and target", "alarm": "Collapse alarm",
}  # fmt: skip
_TIMES = {name: 100.0 for name in ("knn", "linear", "top1", "top5", "best_top1", "mfu")} | {"peak_bytes": 1e-9}
_FIRST = {name: (f"{name}_untrained", f"{name}_start") for name in ("knn", "linear")}  # the values before training
_USUAL = ("loss", "eval_loss", "knn", "linear", "top1", "top5", "target_std", "lr")
_LEGEND, _HANDLE = 9, 0.75  # points of its text; inches of a key with the space around it
_MOST_POINTS = 400  # of a line; more are averaged


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The rows of a run and the name that it is shown by."""

    name: str
    rows: list[dict[str, Any]]

    def points(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps and values (n,) of a field, as shown: shares in percent, bytes in GB."""
        found = [(row["step"], row[field]) for row in self.rows if is_number(row.get(field))]
        steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return steps, values * _TIMES.get(field, 1.0)

    def fields(self) -> list[str]:
        """Returns the fields with at least one number, in the order of the rows."""
        return list(dict.fromkeys(name for row in self.rows for name, value in row.items() if is_number(value)))

    def alarms(self) -> list[tuple[float, float | None]]:
        """Returns the step at which each alarm went off, and that at which it was first off again, None if never."""
        found: list[tuple[float, float | None]] = []
        for step, value in zip(*self.points("alarm"), strict=True):
            is_on = bool(found) and found[-1][1] is None
            if value and not is_on:
                found.append((float(step), None))
            elif is_on and not value:
                found[-1] = found[-1][0], float(step)
        return found


def read_runs(paths: Sequence[str], *, begun: bool = True) -> list[RunRows]:
    """Returns the rows of runs: folders, `metrics.jsonl` files or published CSV logs.

    Raises:
        DataError: one can't be read, or has no rows and should have `begun`.
    """
    names = run_names(paths)
    return [RunRows(name=name, rows=_read(Path(path), begun)) for name, path in zip(names, paths, strict=True)]


def _read(path: Path, begun: bool) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        return read_published_log(path)
    file = path / JSONL_NAME if path.is_dir() else path
    rows = read_rows(file)
    if not rows and begun:
        raise DataError(f"{file} has no rows; give a run's folder, its {JSONL_NAME} or a published .csv log")
    return rows


def run_names(paths: Sequence[str]) -> list[str]:
    """Returns a name for each path: its last part, or as many more as tell it from the others."""
    parts = [[part for part in Path(path).parts if part not in ("/", JSONL_NAME)] or [path] for path in paths]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        count = next((n for n in range(1, len(mine)) if all(o[-n:] != mine[-n:] for o in others)), len(mine))
        names.append("/".join(mine[-count:]))
    return names


def title_of(field: str) -> str:
    """Returns what a field of the rows is called on a page."""
    return _TITLES.get(field, field.replace("_", " "))


def usual_fields(runs: Sequence[RunRows]) -> list[str]:
    """Returns the fields that say most, of those that there are."""
    there = {field for run in runs for field in run.fields()}
    return [field for field in _USUAL if field in there]


def draw_runs(runs: Sequence[RunRows], path: Path, fields: Sequence[str] = ()) -> Path:
    """Draws a plot for each field with a line for each run, as a PNG; returns its path.

    Raises:
        DataError: no run has such a field, or none has any.
    """
    there = sorted({field for run in runs for field in run.fields()})
    for field in fields:
        if field not in there:
            raise DataError(f"field {unknown(field, there)}")
    fields = list(fields) or usual_fields(runs)
    if not fields:
        raise DataError(f"{', '.join(run.name for run in runs)}: no row has a loss; train at least logging.every steps")
    columns = 1 if len(fields) == 1 else 2
    lines = math.ceil(len(fields) / columns)
    width = 4.6 * columns
    names = [_legible(run.name, width) for run in runs] if len(runs) > 1 else []
    widest = max((width_of(name, _LEGEND) + _HANDLE for name in names), default=1.0)
    across = max(1, min(len(names), int(width / widest)))
    figure = new_figure(width=width, height=2.5 * lines + 0.5 + 0.2 * math.ceil(len(names) / across))
    plots = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axes, field in zip(plots, fields, strict=False):
        plot_field(axes, runs, field)
    for axes in plots[len(fields) :]:
        axes.set_axis_off()
    for axes in plots[max(0, len(fields) - columns) : len(fields)]:
        axes.set_xlabel("Step", fontsize=9, color=MUTED)
    if names:
        handles = [_line(number) for number in range(len(runs))]
        labels = [name.replace("$", r"\$") for name in names]
        options = {"fontsize": _LEGEND, "labelcolor": INK, "frameon": False, "ncols": across}
        figure.legend(handles, labels, loc="outside upper left", **options)
    return save_figure(figure, path)


def _legible(name: str, width: float) -> str:
    return fitted(name, _LEGEND, width - _HANDLE)


def _line(number: int) -> Line2D:
    """Returns the key of a run's lines."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **_style(number))


def _style(number: int) -> dict[str, Any]:
    """Returns the colour and the dashes of a run's lines."""
    dashes = _DASHES[number // len(RUN_COLORS) % len(_DASHES)]
    return {"color": RUN_COLORS[number % len(RUN_COLORS)], "linestyle": dashes, "linewidth": 1.6}


def plot_field(axes: Axes, runs: Sequence[RunRows], field: str) -> None:
    """Draws one field of all runs. Where a line has many points, the band is where 80% of them are."""
    from matplotlib.ticker import MaxNLocator

    for number, run in enumerate(runs):
        steps, values = run.points(field)
        if not len(steps):
            continue
        color = _style(number)["color"]
        groups = np.array_split(np.arange(len(steps)), min(len(steps), _MOST_POINTS))
        x, y = (np.array([each[group].mean() for group in groups]) for each in (steps, values))
        if len(steps) > 2 * _MOST_POINTS:
            low, high = np.array([np.quantile(values[group], (0.1, 0.9)) for group in groups]).T
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        few = len(x) <= 12
        axes.plot(x, y, marker="o" if few else None, markersize=3.5, **_style(number))
        for name in _FIRST.get(field, ()):
            _, before = run.points(name)
            if len(before):
                first = before[0] * _TIMES.get(field, 1.0)
                axes.axhline(first, color=color, linestyle=(0, (2, 3)), linewidth=1.1)
                called = "untrained" if name.endswith("untrained") else "start"
                away = -1 if y[-1] >= first else 1  # from where the line ends
                axes.annotate(
                    called, (0.995, first), (0, 3 * away), xycoords=axes.get_yaxis_transform(),
                    textcoords="offset points", fontsize=7.5, color=MUTED, ha="right",
                    va="bottom" if away > 0 else "top",
                )  # fmt: skip
    axes.set_title(title_of(field), loc="left", fontsize=10, color=INK)
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))  # steps are whole
    axes.margins(x=0.02, y=0.12)
    for number, run in enumerate(runs):
        if len(run.points(field)[0]):
            mark_alarms(axes, run, RUN_COLORS[number % len(RUN_COLORS)])
    if field == "target_std":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_number)
    axes.xaxis.set_major_formatter(_number)


def style_axes(axes: Axes) -> None:
    """Gives a plot the lines and texts that all plots have."""
    axes.grid(alpha=0.35, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=8, colors=MUTED)


def mark_alarms(axes: Axes, run: RunRows, color: str, places: Callable[[float], float] = float) -> None:
    """Marks the steps at which alarms went off: a line with a cross. `places` turns steps into the plot's positions."""
    for step, _ in run.alarms():
        place = places(step)
        axes.axvline(place, color=color, linestyle=(0, (4, 2)), linewidth=1.1)
        axes.plot(
            [place], [0.97], "x", color=color, markersize=6, markeredgewidth=1.6, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _number(value: float, _: object) -> str:
    """Returns the number of a tick: in full where it is short."""
    return f"{value:,.10g}" if value == 0 or 1e-2 <= abs(value) < 1e6 else f"{value:.1e}".replace("e-0", "e-")


def curve_svg(runs: Sequence[RunRows], field: str, salt: str) -> str:
    """Returns a plot of one field as SVG in the page's colours, see `themed_svg`."""
    figure = new_figure(width=4.2, height=2.5)
    plot_field(figure.subplots(), runs, field)
    return themed_svg(figure, salt)


def themed_svg(figure: Figure, salt: str) -> str:
    """Returns a figure of one plot over the steps as SVG whose text and lines take the colours of the page around it.

    `salt` makes its identifiers differ from those of other plots of the page.
    """
    from matplotlib import rc_context

    (axes,) = figure.axes
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.set_title("", loc="left")  # the page has it as text
    axes.set_xlabel("Step", fontsize=8.5, color=MUTED)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, name in ((INK, "--ink"), (MUTED, "--muted"), ("#b0b0b0", "--line")):
        svg = svg.replace(color, f"var({name})")
    for before in ('id="', "url(#", 'href="#'):
        svg = svg.replace(before, f"{before}{salt}-")
    return svg

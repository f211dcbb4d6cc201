"""Curves of `health`, of several runs in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ijepa_scale.errors import DataError
from ijepa_scale.metrics.plots import BLUE, GREY, ORANGE, draw_line, new_figure, save_figure
from ijepa_scale.metrics.stored_rows import read_rows

_PANELS = {  # field -> title, whether the axis is logarithmic
    "feature_std": ("feature_std", False),
    "rank_me": ("RankMe", False),
    "lidar": ("LiDAR", False),
    "relative_loss": ("relative_loss", True),
    "context_cosine": ("context_cosine", False),
    "health_loss": ("health_loss", True),
}
_COLOURS = (BLUE, ORANGE, "#aa3377", "#339966", GREY)


def draw_health(runs: Mapping[str, str | Path], path: str | Path) -> Path:
    """Draws the figures of health over the steps of each run, by its label; returns the path of the PNG.

    `runs` holds the paths of `metrics.jsonl`.

    Raises:
        DataError: a run has no figures of health.
    """
    figure = new_figure(width=10.5, height=5.4)
    panels = figure.subplots(2, 3, sharex=True).flatten()
    for number, (label, metrics) in enumerate(runs.items()):
        rows = [row for row in read_rows(metrics) if row.get("rank_me") is not None]
        if not rows:
            raise DataError(f"{metrics} has no figures of health; train with health.every above 0 first")
        for axes, (field, (title, is_log)) in zip(panels, _PANELS.items(), strict=True):
            draw_line(axes, rows, field, _COLOURS[number % len(_COLOURS)], title=title)
            axes.lines[-1].set_label(label)
            if is_log:
                axes.set_yscale("log")
        alarms = [row for row in rows if row.get("alarm")]
        if alarms:
            first = alarms[0]
            panels[0].plot(
                first["step"], first["feature_std"], "x", color=_COLOURS[number % len(_COLOURS)], ms=9, mew=2
            )
    panels[0].legend(frameon=False, fontsize=9)
    panels[0].set_ylim(bottom=0.0)
    for axes in panels[3:]:
        axes.set_xlabel("Step")
    return save_figure(figure, path)

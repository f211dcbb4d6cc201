"""The report of runs as one HTML page that needs nothing else: no network, no script, no font of its own.

Jinja escapes all text from files. The page's policy forbids scripts and anything from outside, in case that ever fails.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ijepa_scale import __version__
from ijepa_scale.errors import ConfigError, UserError
from ijepa_scale.metrics.sinks import BLOCK_NORM, HEALTH
from ijepa_scale.new_file import new_file
from ijepa_scale.shipped import as_called
from ijepa_scale.visualize.block_gradients import BlockNormMap, block_norms, block_svg, common_scale
from ijepa_scale.visualize.curves import RUN_COLORS, curve_svg, title_of, usual_fields
from ijepa_scale.visualize.report_runs import (
    SCHEDULE,
    SPEED,
    Run,
    differences,
    environment,
    read_folders,
    summary,
)
from ijepa_scale.visualize.report_values import shown
from ijepa_scale.visualize.sheet import Scale, Sheet
from ijepa_scale.visualize.sheets import attention_sheet, error_sheet, mask_sheet, pca_sheet, retrieval_sheet
from ijepa_scale.visualize.source import PictureSource

_TEMPLATE = "report.html.jinja"
_TILE = 224  # pixels: side of a picture on the page
_MOST_PLOTS = 12  # of a section
_SHEETS: tuple[tuple[Callable[..., Sheet], int], ...] = (
    (mask_sheet, 6), (pca_sheet, 6), (attention_sheet, 2), (error_sheet, 6), (retrieval_sheet, 4),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of the page: its title, its SVG, and what it shows in words."""

    title: str
    svg: Markup
    meaning: str
    scale: Scale | None = None  # what its colours mean


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The sheets of a run, and a line for each that can't be drawn."""

    run: str
    sheets: list[Sheet]
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the report shows besides the runs' own files."""

    images: Sequence[str] = ()
    evaluations: Sequence[str] = ()
    pictures: bool = True
    overwrite: bool = False


def write_report(folders: Sequence[str], to: Path, options: ReportOptions) -> Path:
    """Writes the report of the runs in `folders`, and returns its path. It has its final name once it is whole.

    Raises:
        UserError: a folder is no run's, a file can't be read, or `to` exists or doesn't end in .html.
    """
    if to.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{to} ends in {to.suffix!r}; a report is written as .html")
    if to.exists() and not options.overwrite:
        raise ConfigError(f"{to} exists; name another file with --to, or add --overwrite")
    runs = read_folders(folders, options.evaluations)
    galleries = [_gallery(run, options.images) for run in runs] if options.pictures else []
    text = as_called(render(runs, galleries))
    with new_file(to) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return to


def render(runs: Sequence[Run], galleries: Sequence[Gallery]) -> str:
    """Returns the page."""
    place = FileSystemLoader(Path(__file__).parent)
    pages = Environment(
        loader=place, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # escapes whatever a template's name is
    pages.globals |= {"data_uri": data_uri, "stops": _stops, "shown": shown}
    there = [field for run in runs for field in run.rows.fields()]
    fields = list(dict.fromkeys(there))
    curves = usual_fields([run.rows for run in runs])
    speed = [name for name in SPEED if name in fields]
    health = list(_health(fields, [*curves, *speed, *SCHEDULE]))
    drawn, left_out = health[:_MOST_PLOTS], health[_MOST_PLOTS:]
    plots = _plots(runs, [*curves, *speed, *drawn])
    blocks = {run.name: norms for run in runs if (norms := block_norms(run.rows)) is not None}
    return pages.get_template(_TEMPLATE).render(
        runs=runs,
        colors=[RUN_COLORS[number % len(RUN_COLORS)] for number in range(len(runs))],
        title=f"Report: {', '.join(run.name for run in runs)}",
        version=__version__,
        summary=list(summary(runs)),
        curves=[plots[name] for name in curves],
        speed=[plots[name] for name in speed],
        health=[*(plots[name] for name in drawn if name != "alarm"), *_block_plots(runs, blocks)],
        left_out=left_out,
        latest=[*((title_of(name), [shown(run.last(name)) or "not measured" for run in runs])
                  for name in ("target_std", *health) if name in fields),
                *_extreme_blocks(runs, blocks)],
        galleries=galleries,
        differences=differences(runs),
        environment=environment(runs),
    )  # fmt: skip


def _health(fields: Sequence[str], elsewhere: Sequence[str]) -> Iterator[str]:
    """Yields the fields that stand in no other section; they may be any that a run writes."""
    for field in sorted(fields, key=lambda field: HEALTH.index(field) if field in HEALTH else len(HEALTH)):
        of_another = field.startswith((BLOCK_NORM, "best_")) or field.endswith(("_untrained", "_start"))
        if field not in elsewhere and not of_another:
            yield field


def _block_plots(runs: Sequence[Run], blocks: Mapping[str, BlockNormMap]) -> Iterator[Plot]:
    """Yields a map of the blocks' gradient norms for each run that measured them, all in one scale."""
    scale = common_scale(blocks.values()) if blocks else None
    for number, run in enumerate(runs):
        if scale is None or run.name not in blocks:
            continue
        found = blocks[run.name]
        svg = Markup(block_svg(found, run.rows, scale, f"blocks{number}"))
        title = "Gradient norm of each block" + (f", {run.name}" if len(runs) > 1 else "")
        latest = "; ".join(f"{block} {shown(norm)}" for block, norm in found.latest().items())
        yield Plot(title=title, svg=svg, meaning=f"At step {found.steps[-1]:.0f}: {latest}", scale=scale)


def _extreme_blocks(runs: Sequence[Run], blocks: Mapping[str, BlockNormMap]) -> Iterator[tuple[str, list[str]]]:
    for called, choose in (("Largest", max), ("Smallest", min)) if blocks else ():
        cells = []
        for run in runs:
            latest = blocks[run.name].latest() if run.name in blocks else {}
            block = choose(latest, key=lambda name: latest[name], default="")
            cells.append(f"{shown(latest[block])} ({block})" if block else "not measured")
        yield f"{called} gradient norm of a block", cells


def _plots(runs: Sequence[Run], fields: Sequence[str]) -> dict[str, Plot]:
    rows = [run.rows for run in runs]
    found = {}
    for number, field in enumerate(fields):
        parts = []
        for run in runs:
            steps, values = run.rows.points(field)
            if len(steps):
                first, last = shown(float(values[0])), shown(float(values[-1]))
                parts.append(f"{run.name}: {first} at step {steps[0]:.0f}, {last} at step {steps[-1]:.0f}")
        svg = Markup(curve_svg(rows, field, f"plot{number}"))  # holds numbers only, no text from files
        found[field] = Plot(title=title_of(field), svg=svg, meaning="; ".join(parts))
    return found


def _gallery(run: Run, images: Sequence[str]) -> Gallery:
    """Returns the sheets of a run's newest checkpoint. What can't be drawn is said on the page."""
    source = PictureSource(source=str(run.path), images=images)
    sheets, problems = [], []
    for make, count in _SHEETS:
        try:
            sheets.append(make(source, count=count))
        except UserError as error:
            problems.append(str(error))
    return Gallery(run=run.name, sheets=sheets, problems=list(dict.fromkeys(problems)))


def data_uri(pixels: np.ndarray) -> str:
    """Returns a picture (H, W, 3) uint8 as the address of an embedded JPEG, at most 224 pixels high."""
    image = Image.fromarray(pixels)
    if image.height > _TILE:
        image = image.resize((max(1, round(image.width * _TILE / image.height)), _TILE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "jpeg", quality=86)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _stops(scale: Scale) -> str:
    """Returns a colour map as the stops of a CSS gradient."""
    ramp: Any = colormaps[scale.colors]
    return ", ".join(to_hex(ramp(share)) for share in np.linspace(0, 1, 9))

"""Shows a sweep over numbers of nodes: as a table with its assumptions, as JSON, and as a plot."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.new_file import new_file
from ijepa_scale.planning.communication import LINK_SHARE
from ijepa_scale.planning.plan_text import WIDTH
from ijepa_scale.planning.sweep import Point, Sweep

_COLORS = ("#3366aa", "#dd7733", "#339966", "#aa3377", "#888888", "#ccaa22", "#33bbcc", "#884422")


def sweep_text(found: Sweep) -> str:
    """Returns the sweep for a terminal, at most 110 columns wide."""
    parts = ("\n".join(_wrapped(line) for line in part) for part in (_head(found), _rows(found), _assumed(found)))
    return "\n\n".join(parts)


def sweep_json(found: Sweep) -> dict[str, Any]:
    """Returns the sweep as plain values: bytes, seconds, hours."""
    return {
        "gpu": found.device.name,
        "gpus_per_node": found.gpus_per_node,
        "assumptions": dataclasses.asdict(found.assumptions),
        "baseline": dataclasses.asdict(found.baseline),
        "skipped": {str(nodes): why for nodes, why in found.skipped.items()},
        "points": [dataclasses.asdict(point) for point in found.points],
    }


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * 11) if len(line) > WIDTH else line


def _gigabits(network: float) -> str:
    return f"{8 * network / 1e9:g}"


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"


def _head(found: Sweep) -> Iterator[str]:
    config, device = found.config, found.device
    model = config.model if isinstance(config, PretrainConfig) else config.model.pretrained
    height, width = model.image_size
    yield f"model      {model.name}/{model.patch_size} at {height}x{width}, {config.engine.precision}, simulated"
    yield (
        f"nodes      of {found.gpus_per_node} {device.name}: {device.memory_bytes / 1e9:.0f} GB, links "
        f"{device.link_bandwidth / 1e9:.0f} GB/s; networks of {', '.join(map(_gigabits, found.assumptions.networks))} "
        "Gb/s per GPU and direction"
    )
    for nodes, why in found.skipped.items():
        yield f"skipped    {_nodes(nodes)}: {why}"


def _rows(found: Sweep) -> Iterator[str]:
    """Yields a line for each number of nodes and strategy, at the fastest network; efficiency at each."""
    networks = found.assumptions.networks
    titles = "".join(f"{f'at {_gigabits(each)}':>8}" for each in networks)
    yield f"{'':<48}{f'with {_gigabits(networks[-1])} Gb/s':>37} efficiency"
    yield (
        f"{'nodes':>5}{'GPUs':>6}{'batch':>6} {'strategy':<15}{'fits':>5}{'wire GB':>9}{'step ms':>10}"
        f"{'images/s':>10}{'GPU-hours':>11} {titles}"
    )
    for nodes in found.plans:
        points = found.at(nodes, networks[-1])
        fastest = max((point.images_per_s for point in points if point.fits), default=None)
        for point in points:
            same = [
                each for network in networks for each in found.at(nodes, network) if each.strategy == point.strategy
            ]
            marks = "*" if point.fits and point.images_per_s == fastest else ""
            marks += "<-" if point.configured else ""
            yield _row(point, dict.fromkeys(networks) | {each.network: each for each in same}, marks)


def _row(point: Point, by_network: dict[float, Point | None], marks: str) -> str:
    shares = "".join(f"{'' if each is None else f'{each.efficiency:.0%}':>8}" for each in by_network.values())
    return (
        f"{point.nodes:>5}{point.num_gpus:>6}{point.micro_batch:>6} {point.strategy:<15}"
        f"{'yes' if point.fits else 'no':>5}{point.wire_bytes / 1e9:>9.1f}{1e3 * point.step_s:>10.0f}"
        f"{point.images_per_s:>10.0f}{point.gpu_hours:>11.0f} {shares} {marks}"
    ).rstrip()


def _assumed(found: Sweep) -> Iterator[str]:
    assumed, base = found.assumptions, found.baseline
    plan = next(iter(found.plans.values()))
    yield (
        f"efficiency images/s of a GPU, relative to those of {_nodes(base.nodes)} under {base.strategy} "
        f"({base.images_per_s / base.num_gpus:.0f} images/s per GPU); * marks the fastest that "
        "fits, and <- what the configuration would run"
    )
    if assumed.measured is not None:
        yield f"computing  as measured: {assumed.measured.text()}; other sizes on the line through them"
    elif assumed.mfu is not None:
        yield f"computing  at {assumed.mfu:.0%} of the peak (from --mfu), whatever the micro-batch"
    else:
        yield "computing  at the plan's estimated MFU, which nobody has measured; --measured or --mfu replaces it"
    yield (
        f"assumed    {assumed.overlap:.0%} of the communication that can run during computation is hidden by it and "
        f"slows nothing; collectives reach {LINK_SHARE:.0%} of a link; a ring that crosses nodes uses the adapters of "
        "all its processes there; latency, the waits of ZeRO-3's host, stragglers, loading, evaluation and checkpoints "
        "take no time"
    )
    yield (
        f"           GPU-hours are those of the whole run, {plan.steps} steps on {_nodes(plan.cluster.num_nodes)} "
        f"({plan.num_images:,} images, {plan.images_source}); batch is the images of a GPU at once"
    )


def draw_sweep(found: Sweep, path: str | Path) -> None:
    """Draws efficiency over the number of nodes, a panel for each network and a line for each strategy, as a PNG.

    Dots are missing where a strategy doesn't fit.
    """
    from matplotlib.figure import Figure

    networks = found.assumptions.networks
    figure = Figure(figsize=(4.2 * len(networks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(point.strategy for point in found.points))
    for axes, network in zip(panels, networks, strict=True):
        for index, name in enumerate(names):
            points = [each for each in found.points if (each.strategy, each.network) == (name, network)]
            fitting = [each for each in points if each.fits]
            color = _COLORS[index % len(_COLORS)]
            axes.plot([p.nodes for p in points], [p.efficiency for p in points], color=color, linewidth=1.4, label=name)
            axes.plot([p.nodes for p in fitting], [p.efficiency for p in fitting], "o", color=color, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found.plans), [str(nodes) for nodes in found.plans])
        axes.set_ylim(bottom=0)
        axes.set_title(f"{_gigabits(network)} Gb/s per GPU", loc="left", fontsize=10)
        axes.set_xlabel(f"nodes of {found.gpus_per_node} {found.device.name}")
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("efficiency (simulated)")
    panels[-1].legend(frameon=False, fontsize=8)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


__all__ = ["draw_sweep", "sweep_json", "sweep_text"]

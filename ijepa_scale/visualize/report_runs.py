"""What the files of a run's folder say, for the report. Reads files, draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.config.earlier import renamed
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.yaml_text import flat, parse_yaml
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.results import JSON
from ijepa_scale.metrics.sinks import JSONL_NAME
from ijepa_scale.visualize.curves import RunRows, read_runs, title_of
from ijepa_scale.visualize.report_evaluations import Evaluation, read_classes, read_evaluation
from ijepa_scale.visualize.report_values import read_json, read_text, shown

CONFIG, PROVENANCE = "config.yaml", "run.json"
SPEED = ("images_per_s", "step_ms", "data_wait_ms", "mfu", "peak_bytes")
SCHEDULE = ("lr", "weight_decay", "momentum", "epoch", "images_seen", "step")
_ACCURACIES = ("knn", "linear", "top1", "best_top1")
_MOST_STEPS = 8  # of alarms, in a cell
_NO_CHOICE = ("folder", "chosen_by_recipe")  # differ between all runs, or say why a setting was chosen


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder tells it: rows, settings by dotted name, where it was made, and evaluations by file."""

    path: Path
    rows: RunRows
    config_text: str | None
    config: dict[str, Any]
    provenance: dict[str, Any]
    evaluations: list[Evaluation]

    @property
    def name(self) -> str:
        """The name that tells it from the other runs."""
        return self.rows.name

    def last(self, field: str) -> float | None:
        """Returns the last number of a field, as shown."""
        _, values = self.rows.points(field)
        return float(values[-1]) if len(values) else None

    def median(self, field: str) -> float | None:
        """Returns the median of a field, as shown."""
        _, values = self.rows.points(field)
        return float(np.median(values)) if len(values) else None


def read_folders(folders: Sequence[str], evaluations: Sequence[str] = ()) -> list[Run]:
    """Returns the runs; further evaluation files go with the first.

    Raises:
        UserError: a folder is no run's, or a file can't be read.
    """
    for folder in folders:
        if not (Path(folder) / JSONL_NAME).is_file():
            raise DataError(f"{folder} has no {JSONL_NAME}; give the folder of a run")
    found = []
    for number, (folder, rows) in enumerate(zip(folders, read_runs(folders, begun=False), strict=True)):
        path = Path(folder)
        text = read_text(path / CONFIG)
        config = parse_yaml(text, str(path / CONFIG)) if text is not None else {}
        if not isinstance(config, dict):
            raise ConfigError(f"{path / CONFIG} isn't a mapping of settings; copy it again from the run")
        model = config.get("model")
        if isinstance(model, dict) and "num_classes" in model:  # of finetuning
            config = renamed(config, FinetuneConfig, [])
        files = [*sorted(path.glob(f"**/{JSON}")), *(map(Path, evaluations) if number == 0 else ())]
        found.append(
            Run(
                path=path,
                rows=rows,
                config_text=text,
                config=flat(config),
                provenance=read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else {},
                evaluations=[*map(read_evaluation, files), *filter(None, [read_classes(path)])],
            )
        )
    return found


def summary(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """Yields a figure's name and its text for each run; a figure that no run has is left out."""
    figures = [
        ("Steps", [shown(run.last("step")) for run in runs]),
        ("Images seen", [shown(run.last("images_seen")) for run in runs]),
        ("Last loss", [shown(run.last("loss")) for run in runs]),
        *(
            (title_of(name), [_with_first(run, name) for run in runs])
            for name in ("knn", "linear", "top1", "best_top1")
        ),
        ("Collapse alarms", [_alarms(run) for run in runs]),
        (f"Last {title_of('target_std').lower()}", [shown(run.last("target_std")) for run in runs]),
        *((f"{title_of(name)}, median", [shown(run.median(name)) for run in runs]) for name in SPEED[:3]),
        *((title_of(name), [shown(run.last(name)) for run in runs]) for name in SPEED[3:]),
        *((name.capitalize(), [shown(run.provenance.get(name)) for run in runs]) for name in ("device", "processes")),
    ]
    for name, cells in figures:
        if any(cells):
            yield name, [cell or "not measured" for cell in cells]


def _alarms(run: Run) -> str:
    if run.last("alarm") is None:
        return ""
    found = run.rows.alarms()
    if not found:
        return "none"
    steps = ", ".join([f"{first:,.0f}" for first, _ in found[:_MOST_STEPS]] + ["..."] * (len(found) > _MOST_STEPS))
    return f"{len(found)}, at step {steps}" + ("; still on" if found[-1][1] is None else "")


def _with_first(run: Run, field: str) -> str:
    last = run.last(field)
    if last is None:
        return ""
    for name, called in ((f"{field}_untrained", "untrained"), (f"{field}_start", "at the start")):
        _, first = run.rows.points(name)
        if len(first):
            return f"{last:.1f} ({called} {100 * first[0]:.1f})"
    return f"{last:.1f}"


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns the settings in which runs with a config.yaml differ, each with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in _NO_CHOICE)
    known = [run for run in runs if run.config_text is not None]
    differ = [name for name in names if len({_setting(run.config, name) for run in known}) > 1]
    return [(name, [_setting(run.config, name) if run in known else "unknown" for run in runs]) for name in differ]


def _setting(config: Mapping[str, Any], name: str) -> str:
    if name not in config:
        return "not set"
    return "null" if config[name] is None else shown(config[name])


def environment(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns versions, revision and device, each for every run."""
    facts = [flat(run.provenance) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    rows = [(name, [shown(each.get(name)) for each in facts]) for name in names]
    return [(name, [cell or "unknown" for cell in cells]) for name, cells in rows if any(cells)]

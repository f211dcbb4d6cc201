"""What the files of a run's folder say, for the report. Reads files, draws nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.config.yaml_text import flat, parse_yaml
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.metrics.sinks import JSONL_NAME, is_number
from ijepa_scale.regular_file import read_regular
from ijepa_scale.visualize.curves import RunRows, read_runs, title_of

CONFIG, PROVENANCE, EVALUATION = "config.yaml", "run.json", "evaluation.json"
SPEED = ("images_per_s", "step_ms", "data_wait_ms", "mfu", "peak_bytes")
SCHEDULE = ("lr", "weight_decay", "momentum", "epoch", "images_seen", "step")
_NO_CHOICE = ("folder", "chosen_by_recipe")  # differ between all runs, or say why a setting was chosen
_SHARES = ("accuracy", "low", "high")


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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation's table: what was evaluated, column names, and a row of cells for each protocol."""

    file: str
    facts: dict[str, Any]
    columns: list[str]
    rows: list[list[str]]


def read_folders(folders: Sequence[str], evaluations: Sequence[str] = ()) -> list[Run]:
    """Returns the runs; further evaluation files go with the first.

    Raises:
        UserError: a folder is no run's, or a file can't be read.
    """
    for folder in folders:
        if not (Path(folder) / JSONL_NAME).is_file():
            raise DataError(f"{folder} has no {JSONL_NAME}; give the folder of a run")
    found = []
    for number, (folder, rows) in enumerate(zip(folders, read_runs(folders), strict=True)):
        path = Path(folder)
        text = _text(path / CONFIG)
        config = parse_yaml(text, str(path / CONFIG)) if text is not None else {}
        if not isinstance(config, dict):
            raise ConfigError(f"{path / CONFIG} isn't a mapping of settings; copy it again from the run")
        files = [*sorted(path.glob(f"**/{EVALUATION}")), *(map(Path, evaluations) if number == 0 else ())]
        found.append(
            Run(
                path=path,
                rows=rows,
                config_text=text,
                config=flat(config),
                provenance=_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else {},
                evaluations=[read_evaluation(file) for file in files],
            )
        )
    return found


def read_evaluation(path: Path) -> Evaluation:
    """Returns the table that `launch/evaluate.py` wrote as JSON.

    Raises:
        DataError: it can't be read, or isn't such a table.
    """
    content = _json(path)
    scores, untrained, published = (content.get(name) or [] for name in ("scores", "untrained", "published"))
    lists = isinstance(scores, list) and isinstance(untrained, list)
    if not lists or not all(isinstance(score, dict) and "protocol" in score for score in scores):
        raise DataError(f"{path} holds no scores with a protocol; give the {EVALUATION} of launch/evaluate.py")
    reference = {str(score.get("protocol")): score for score in untrained if isinstance(score, dict)}
    names = [n for n in dict.fromkeys(name for score in scores for name in score) if n not in ("protocol", *_SHARES)]
    columns = ["protocol", "accuracy", "95% interval", "untrained", "published", *names]
    rows = []
    for score in scores:
        protocol = shown(score["protocol"])
        first = reference.get(str(score["protocol"]), {}).get("accuracy")
        known = published.get(str(score["protocol"])) if isinstance(published, dict) else None
        interval = f"{_share(score['low'])} to {_share(score['high'])}" if {"low", "high"} <= score.keys() else ""
        figures = [_share(score.get("accuracy")), interval, _share(first), f"{known:.1f}%" if is_number(known) else ""]
        rows.append([protocol, *figures, *(shown(score.get(name)) for name in names)])
    kept = [column for column in range(len(columns)) if column == 0 or any(row[column] for row in rows)]
    facts = content.get("facts")
    return Evaluation(
        file=str(path),
        facts=facts if isinstance(facts, dict) else {},
        columns=[columns[column] for column in kept],
        rows=[[row[column] for column in kept] for row in rows],
    )


def _share(value: Any) -> str:
    return f"{100 * value:.2f}%" if is_number(value) else shown(value)


def summary(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """Yields a figure's name and its text for each run; a figure that no run has is left out."""
    figures = [
        ("Steps", [shown(run.last("step")) for run in runs]),
        ("Images seen", [shown(run.last("images_seen")) for run in runs]),
        ("Last loss", [shown(run.last("loss")) for run in runs]),
        *((title_of(name), [_with_first(run, name) for run in runs]) for name in ("knn", "top1")),
        (f"Last {title_of('target_std').lower()}", [shown(run.last("target_std")) for run in runs]),
        *((f"{title_of(name)}, median", [shown(run.median(name)) for run in runs]) for name in SPEED[:3]),
        *((title_of(name), [shown(run.last(name)) for run in runs]) for name in SPEED[3:]),
        *((name.capitalize(), [shown(run.provenance.get(name)) for run in runs]) for name in ("device", "processes")),
    ]
    for name, cells in figures:
        if any(cells):
            yield name, [cell or "not measured" for cell in cells]


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
    """Returns the settings in which runs differ, each with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in _NO_CHOICE)
    rows = [(name, [_setting(run.config, name) for run in runs]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]


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


def shown(value: Any) -> str:
    """Returns a value of a file as the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _text(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return read_regular(path).decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); check its permissions") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as JSON ({error}); copy it again, or leave it out") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; copy it again, or leave it out")
    return content

"""Where rows of numbers go: a JSON-lines file always, TensorBoard and others if wanted.

Only process 0 writes; the others get a `Sinks` without members. A sink that isn't here is one file and one line in
`registry.SINKS`: a class with `Config`, built from (its section, the run's folder, drop_from=, run=).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ijepa_scale.config import LoggingConfig
from ijepa_scale.errors import DataError
from ijepa_scale.registry import SINKS

JSONL_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
_GROUPS = {
    "speed": ("data_wait_ms", "step_ms", "images_per_s", "mfu", "peak_bytes"),
    "schedule": ("lr", "weight_decay", "momentum", "epoch", "images_seen"),
    "masks": ("context_tokens", "target_tokens"),
    "evaluate": ("knn", "knn_untrained"),
}


class Sink(Protocol):
    """Takes rows; each has a `step`.

    Built as `(config, folder, *, drop_from, run)`: its section, the run's folder, the first step that is taken anew
    (0 or None at the start), and the run's configuration as plain values.
    """

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row."""

    def close(self) -> None:
        """Finishes writing."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSON-lines file; [] where there is none. A torn last line, left by a kill, is dropped.

    Raises:
        DataError: a line before the last isn't a JSON object with a step.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number} is {line[:40]!r}, not a JSON object with a step; mend it or move the file away"
            ) from None
        rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    """Returns None for NaN and infinities, which JSON can't hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlSink:
    """Appends one JSON object a line to `path`, each handed to the operating system at once.

    Rows with step >= `drop_from` are dropped first, through a temporary file and a rename, so that a
    run that starts over (0), or goes on after k steps (k + 1), has each step once. None keeps all.
    """

    def __init__(self, path: str | Path, drop_from: int | None = None) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            rows = read_rows(self._path)
            self._rewrite([row for row in rows if drop_from is None or row["step"] < drop_from])
        self._file = self._path.open("a", encoding="utf-8")

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends the row; NaN and infinities are written as null."""
        line = json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardSink:
    """Writes the numbers of each row as TensorBoard scalars, grouped by what they are about.

    What an earlier run wrote for steps >= `drop_from` is hidden.
    """

    def __init__(self, folder: str | Path, drop_from: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 2 s to import: only where it is wanted

        self._writer = SummaryWriter(str(folder), purge_step=drop_from)
        self._tags = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes each number that is there."""
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(self._tags.get(name, f"train/{name}"), value, row["step"])

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


class Sinks:
    """Hands each row to every member; a context manager that closes them."""

    def __init__(self, members: Iterable[Sink] = ()) -> None:
        self._members = list(members)

    def write(self, row: Mapping[str, Any]) -> None:
        """Hands the row to every member."""
        for member in self._members:
            member.write(row)

    def close(self) -> None:
        """Closes every member."""
        for member in self._members:
            member.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_sinks(
    folder: str | Path, *, rank: int, logging: LoggingConfig, drop_from: int | None, run: Mapping[str, Any]
) -> Sinks:
    """Returns the sinks of a run: `metrics.jsonl`, `tensorboard/` if wanted, and `logging.sinks`; none but on rank 0.

    Raises:
        ConfigError: a sink is unknown, or its package isn't installed.
    """
    if rank != 0:
        return Sinks()
    folder = Path(folder)
    members: list[Sink] = [JsonlSink(folder / JSONL_NAME, drop_from)]
    if logging.tensorboard:
        members.append(TensorBoardSink(folder / TENSORBOARD_NAME, drop_from))
    for name, config in logging.sinks.items():
        members.append(SINKS.get(name)(config, folder, drop_from=drop_from, run=run))
    return Sinks(members)


def is_number(value: Any) -> bool:
    """Returns whether a value of a row is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def kept_id(path: Path, *, resumed: bool, make: Callable[[], str]) -> str:
    """Returns what a tracking service calls this run: from `path` for a resumed run, else made and written there."""
    if resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = make()
    path.write_text(name + "\n", encoding="utf-8")
    return name

"""Summarises a pretraining run from its metrics file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_scale.errors import DataError
from ijepa_scale.metrics.sinks import JSONL_NAME
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.plurals import counted


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The first and last values of a run's curves. kNN accuracies are from 0 to 1, None if they weren't measured."""

    steps: int
    first_loss: float
    last_loss: float
    knn: float | None
    knn_untrained: float | None
    training_s: float  # without evaluation and checkpoints

    def lines(self) -> list[str]:
        """Returns the summary as lines of text."""
        lines = [f"loss      {self.first_loss:.4f} -> {self.last_loss:.4f} after {counted(self.steps, 'step')}"]
        if self.knn is not None and self.knn_untrained is not None:
            gain = 100 * (self.knn - self.knn_untrained)
            lines.append(
                f"kNN       {100 * self.knn_untrained:.1f}% untrained -> {100 * self.knn:.1f}% trained "
                f"({gain:+.1f} points, held-out images)"
            )
        return [*lines, f"training  {self.training_s:.0f} s"]


def summarize(folder: str | Path) -> Summary:
    """Returns the summary of a run folder.

    Raises:
        DataError: the folder's metrics hold no row with a loss.
    """
    path = Path(folder) / JSONL_NAME
    rows = read_rows(path)
    trained = [row for row in rows if row.get("loss") is not None]
    if not trained:
        raise DataError(
            f"{path} holds {counted(len(rows), 'row')} and no loss; train at least logging.every steps first"
        )
    return Summary(
        steps=trained[-1]["step"],
        first_loss=trained[0]["loss"],
        last_loss=trained[-1]["loss"],
        knn=_last(rows, "knn"),
        knn_untrained=_last(rows, "knn_untrained"),
        training_s=_training_s(trained),
    )


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return values[-1] if values else None


def _training_s(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the seconds that the steps took; each row's step time stands for all steps since the previous row."""
    steps = [0, *(row["step"] for row in rows)]
    pairs = zip(rows, steps, strict=False)
    return sum((row["step"] - before) * (row.get("step_ms") or 0.0) for row, before in pairs) / 1e3

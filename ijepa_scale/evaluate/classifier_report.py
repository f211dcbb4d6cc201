"""Writes the results of a finetuning run: figures, a table of classes, and plots."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.classification import Accuracy
from ijepa_scale.metrics.classifier_plots import draw_confusion, draw_training
from ijepa_scale.metrics.sinks import JSONL_NAME

RESULTS, TABLE = "results.json", "classes.csv"
CONFUSION, CURVES = "confusion.png", "curves.png"


def class_names(source: SampleSource, num_classes: int) -> list[str] | None:
    """Returns the names of the classes, or None if the data has none.

    Raises:
        DataError: the number of names isn't `num_classes`.
    """
    names = source.classes
    if names is not None and len(names) != num_classes:
        raise DataError(
            f"the data names {len(names)} classes ({', '.join(names[:3])}, ...) but model.num_classes is "
            f"{num_classes}; set model.num_classes={len(names)}"
        )
    return names


def class_table(counts: np.ndarray, classes: list[str] | None) -> list[dict[str, object]]:
    """Returns a row for each class of a confusion matrix (true, predicted): figures and the most common mistake."""
    rows: list[dict[str, object]] = []
    for number, line in enumerate(counts):
        others = line.copy()
        others[number] = 0
        taken = int(others.argmax()) if others.any() else None
        predicted = int(counts[:, number].sum())
        rows.append(
            {
                "class": classes[number] if classes else number,
                "images": int(line.sum()),
                "recall": float(line[number] / line.sum()) if line.sum() else None,
                "precision": float(line[number] / predicted) if predicted else None,
                "most often taken for": "" if taken is None else classes[taken] if classes else taken,
                "times": int(others.max()),
            }
        )
    return rows


def write_report(
    folder: Path, accuracy: Accuracy | None, step: int, num_classes: int, classes: list[str] | None
) -> None:
    """Writes curves.png, and for an evaluation after `step` steps results.json, classes.csv and confusion.png."""
    draw_training(folder / JSONL_NAME, folder / CURVES)
    if accuracy is None:
        return
    counts = accuracy.confusion(num_classes)
    figures = {
        "step": step,
        "images": len(accuracy.labels), "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss,
    }  # fmt: skip
    (folder / RESULTS).write_text(json.dumps(figures, indent=2) + "\n")
    rows = class_table(counts, classes)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / TABLE).write_text(text.getvalue())
    draw_confusion(counts, classes, folder / CONFUSION)

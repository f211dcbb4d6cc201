"""Writes the results of a finetuning run: figures, a table of classes, and plots."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from ijepa_scale.data.class_names import shortened, written
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.classification import Accuracy
from ijepa_scale.metrics.classifier_plots import draw_confusion
from ijepa_scale.metrics.confusion import Confusion
from ijepa_scale.plurals import counted

RESULTS, TABLE = "results.json", "classes.csv"
CONFUSION = "confusion.png"


def class_names(source: SampleSource, num_classes: int) -> list[str] | None:
    """Returns the names of the classes, or None if the data has none.

    Raises:
        DataError: the number of names isn't `num_classes`.
    """
    names = source.classes
    if names is not None and len(names) != num_classes:
        shown = ", ".join(map(shortened, names[:3]))
        raise DataError(
            f"the data names {counted(len(names), 'class')} ({shown}, ...) but model.num_classes is {num_classes}; "
            f"set model.num_classes={len(names)}"
        )
    return names


def class_table(confusion: Confusion, classes: list[str] | None) -> list[dict[str, object]]:
    """Returns a row for each class: figures and the most common mistake. Names are as `written`."""
    names = [written(name) for name in classes] if classes else list(range(confusion.num_classes))
    taken, times = confusion.worst_mistakes()
    columns = (confusion.images, confusion.guesses, confusion.right, taken, times)
    return [
        {
            "class": name,
            "images": images,
            "recall": right / images if images else None,
            "precision": right / guesses if guesses else None,
            "most often taken for": names[mistake] if mistake >= 0 else "",
            "times": count,
        }
        for name, images, guesses, right, mistake, count in zip(
            names, *(column.tolist() for column in columns), strict=True
        )
    ]


def write_report(folder: Path, accuracy: Accuracy, step: int, num_classes: int, classes: list[str] | None) -> None:
    """Writes results.json, classes.csv and confusion.png of an evaluation after `step` steps."""
    confusion = accuracy.confusion(num_classes)
    figures = {
        "step": step,
        "images": len(accuracy.labels), "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss,
    }  # fmt: skip
    (folder / RESULTS).write_text(json.dumps(figures, indent=2) + "\n")
    rows = class_table(confusion, classes)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / TABLE).write_text(text.getvalue(), encoding="utf-8", newline="")
    draw_confusion(confusion, classes, folder / CONFUSION)

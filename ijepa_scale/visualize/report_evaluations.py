"""The tables of evaluations and of finetuned classifiers, for the report. Reads files, draws nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.classifier_report import RESULTS, TABLE
from ijepa_scale.evaluate.results import JSON
from ijepa_scale.metrics.stored_rows import is_number
from ijepa_scale.visualize.report_values import percent, read_json, read_text, shown

_ALL_SETS = "all sets"  # how launch/evaluate.py calls the mean over further data sets
_INTERVAL = "95% interval"
Entry = Mapping[str, Any]
_T = TypeVar("_T", list[Any], dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts; a `folded` one is long, and shown when the reader opens it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    folded: bool = False

    def named_rows(self) -> list[tuple[str, list[str]]]:
        """Returns the first cell of each row, and the others."""
        return [(row[0], row[1:]) for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was evaluated, and its tables."""

    file: str
    facts: dict[str, Any]
    tables: list[Table]


def read_evaluation(path: Path) -> Evaluation:
    """Returns the tables that `launch/evaluate.py` wrote as JSON: accuracies, or the figures of dense protocols.

    Raises:
        DataError: it can't be read, or isn't such a file.
    """
    content = read_json(path)
    kind = "measures" if "measures" in content else "scores"
    entries = content.get(kind)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "protocol" in entry for entry in entries):
        raise DataError(f"{path} holds no {kind} with a protocol; give the {JSON} of launch/evaluate.py")
    untrained = [entry for entry in _of(list, content, "untrained") if isinstance(entry, dict)]
    facts = _of(dict, content, "facts")
    if kind == "measures":
        tables = _dense(entries, untrained, _of(list, content, "classes"))
    else:
        tables = _accuracies(entries, untrained, _of(dict, content, "published"), facts)
    return Evaluation(file=str(path), facts=facts, tables=[table for table in tables if table.rows])


def _of(kind: type[_T], content: Entry, name: str) -> _T:
    """Returns a part of a file, or an empty one if it is missing or of another type."""
    found = content.get(name)
    return found if isinstance(found, kind) else kind()


def read_classes(folder: Path) -> Evaluation | None:
    """Returns the figures and the table of classes of a finetuning run; None if the folder has none.

    Raises:
        DataError: they can't be read, or aren't such a table.
    """
    text = read_text(folder / TABLE)
    if text is None:
        return None
    lines = list(csv.reader(io.StringIO(text)))
    if not lines or any(len(line) != len(lines[0]) for line in lines):
        raise DataError(f"{folder / TABLE} isn't a table of classes; copy it again from the run, or leave it out")
    shares = [name in ("recall", "precision") for name in lines[0]]
    rows = [[_percent_text(cell) if share else cell for cell, share in zip(line, shares, strict=True)]
            for line in lines[1:]]  # fmt: skip
    table = Table(caption="Classes, on held-out images", columns=lines[0], rows=rows, folded=True)
    facts = read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    facts = {name: percent(value) if name in ("top1", "top5") else value for name, value in facts.items()}
    return Evaluation(file=str(folder / TABLE), facts=facts, tables=[table])


def _percent_text(cell: str) -> str:
    try:
        return percent(float(cell))
    except ValueError:
        return cell


def _accuracies(scores: Sequence[Entry], untrained: Sequence[Entry], published: Entry, facts: Entry) -> Iterator[Table]:
    """Yields the table of the main data set, and that of further ones, whose names stand before the protocols."""
    reference = {str(entry.get("protocol")): entry for entry in untrained}
    further = [*sorted(map(str, facts), key=len, reverse=True), _ALL_SETS]

    def set_of(entry: Entry) -> str:
        return next((name for name in further if str(entry["protocol"]).startswith(f"{name}: ")), "")

    def known(entry: Entry) -> str:
        value = published.get(str(entry["protocol"]))
        return f"{value:.1f}%" if is_number(value) else ""

    figures: dict[str, Callable[[Entry], str]] = {
        "accuracy": lambda entry: percent(entry.get("accuracy")),
        _INTERVAL: lambda entry: _interval(entry, percent),
        "untrained": lambda entry: percent(reference.get(str(entry["protocol"]), {}).get("accuracy")),
        "published": known,
    }
    taken = ("protocol", "accuracy", "low", "high")
    main: dict[str, Callable[[Entry], str]] = {"protocol": lambda entry: shown(entry["protocol"])}
    others: dict[str, Callable[[Entry], str]] = {
        "data set": set_of,
        "protocol": lambda entry: str(entry["protocol"])[len(set_of(entry)) + 2 :],
    }
    own = [entry for entry in scores if not set_of(entry)]
    yield _table("Accuracy on held-out images", own, main | figures, taken)
    yield _table("Accuracy on further data sets", [entry for entry in scores if set_of(entry)], others | figures, taken)


def _dense(measures: Sequence[Entry], untrained: Sequence[Entry], classes: Sequence[Any]) -> Iterator[Table]:
    """Yields the table of all pixels and that of single classes."""

    def key(entry: Entry) -> tuple[str, ...]:
        return tuple(str(entry.get(name)) for name in ("protocol", "measure", "of_class"))

    def value(entry: Entry, figure: Any) -> str:
        return percent(figure) if entry.get("share", True) else shown(figure)

    def name(entry: Entry) -> str:
        number = entry["of_class"]
        known = isinstance(number, int) and 0 <= number < len(classes)
        return shown(classes[number]) if known else f"class {shown(number)}"

    reference = {key(entry): entry for entry in untrained}
    columns: dict[str, Callable[[Entry], str]] = {
        "protocol": lambda entry: shown(entry["protocol"]),
        "measure": lambda entry: shown(entry.get("measure")),
        "value": lambda entry: value(entry, entry.get("value")),
        _INTERVAL: lambda entry: _interval(entry, lambda figure: value(entry, figure)),
        "untrained": lambda entry: value(entry, reference.get(key(entry), {}).get("value")),
    }
    taken = ("protocol", "measure", "value", "low", "high", "share", "of_class")
    whole = [entry for entry in measures if entry.get("of_class") is None]
    single = [entry for entry in measures if entry.get("of_class") is not None]
    yield _table("Figures on held-out images", whole, columns, taken)
    yield _table("Single classes", single, {"class": name, **columns}, taken, folded=True)


def _interval(entry: Entry, text: Callable[[Any], str]) -> str:
    return f"{text(entry['low'])} to {text(entry['high'])}" if {"low", "high"} <= entry.keys() else ""


def _table(
    caption: str,
    entries: Sequence[Entry],
    columns: Mapping[str, Callable[[Entry], str]],
    taken: Sequence[str],
    *,
    folded: bool = False,
) -> Table:
    """Returns the table of entries: `columns`, then all that the entries hold besides `taken`; none that is empty."""
    rest = dict.fromkeys(name for entry in entries for name in entry if name not in taken)
    names = [*columns, *rest]
    rows = [[*(of(entry) for of in columns.values()), *(shown(entry.get(name)) for name in rest)] for entry in entries]
    kept = [place for place in range(len(names)) if place == 0 or any(row[place] for row in rows)]
    return Table(
        caption=caption,
        columns=[names[place] for place in kept],
        rows=[[row[place] for place in kept] for row in rows],
        folded=folded,
    )

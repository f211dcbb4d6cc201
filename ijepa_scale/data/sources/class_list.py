"""The class list of a set of shards: reads it, makes it, and numbers labels that are names by it.

The list is `classes.json` next to the shards: a JSON list of class names, in which position k is the name of label k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.sources.labels import NO_LABEL, TEXT_LABEL, same_to_readers
from ijepa_scale.data.sources.tar_index import ShardIndex
from ijepa_scale.errors import DataError
from ijepa_scale.regular_file import read_regular

CLASSES = "classes.json"


@dataclass(frozen=True)
class NumberedLabels:
    """The labels of each shard, (N,) int64, -1 if there is none; `fault` says why names couldn't be numbered."""

    labels: list[np.ndarray]
    fault: str | None = None


def parse_classes(content: bytes, origin: str) -> list[str]:
    """Returns the class names in the content of a classes.json.

    Raises:
        DataError: it isn't a list of names.
    """
    try:
        names = parse_json(content)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
    except ValueError as error:
        raise DataError(f"{origin} isn't a list of class names ({error}); write it again, or remove it") from None
    return names


def read_classes(folder: Path) -> list[str] | None:
    """Returns the class names stored next to the shards of a folder; None if there are none.

    Raises:
        DataError: the file isn't a list of names.
    """
    path = folder / CLASSES
    try:
        return parse_classes(read_regular(path), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); write it again, or remove it") from None


def number_labels(shards: Sequence[ShardIndex], classes: list[str] | None, origin: str) -> NumberedLabels:
    """Returns the labels of shards as numbers: a name is its position in `classes`, a number stays as it is.

    Pretraining needs no labels, so this doesn't raise: where names can't be numbered, they count as no label.
    `origin` is the path of the list.
    """
    fault = _fault(shards, classes, origin) if any(shard.texts for shard in shards) else None
    number_of = {} if fault is not None else {name: number for number, name in enumerate(classes or ())}
    found = []
    for shard in shards:
        numbers = np.array([number_of.get(text, NO_LABEL) for text in shard.texts], dtype=np.int64)
        named = shard.labels <= TEXT_LABEL
        labels = shard.labels.copy() if named.any() else shard.labels
        labels[named] = numbers[TEXT_LABEL - shard.labels[named]]
        found.append(labels)
    return NumberedLabels(found, fault)


def names_in(shards: Sequence[ShardIndex]) -> list[str]:
    """Returns the class list of shards whose labels are names: all of them, sorted.

    Raises:
        DataError: the labels aren't all names, or two names read the same.
    """
    names = sorted({text for shard in shards for text in shard.texts})
    if not names:
        raise DataError("the labels of these shards are numbers or missing; only names need a class list")
    fault = _mixed(shards) or _ambiguous(shards, names)
    if fault is not None:
        raise DataError(fault)
    return names


def _fault(shards: Sequence[ShardIndex], classes: list[str] | None, origin: str) -> str | None:
    """Returns why labels that are names can't be numbered by `classes`; None if they can."""
    mixed = _mixed(shards)
    if mixed is not None:
        return mixed
    first = next(text for shard in shards for text in shard.texts)
    if classes is None:
        return (
            f"{_where(shards, first)} has the label {first!r}, but there is no {origin} that numbers names; write it "
            "with `python launch/shards.py classes SHARDS`, or copy the one of the training set"
        )
    known, twice = set(classes), [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        return f"{origin} names {twice[0]!r} twice, so labels that are names can't be numbered; name each class once"
    same = same_to_readers(classes)
    if same is not None:
        return (
            f"{origin} names {same[0]!a} and {same[1]!a}, which read the same, so labels that are names can't be "
            "numbered; name each class once"
        )
    missing = next((text for shard in shards for text in shard.texts if text not in known), None)
    if missing is not None:
        like = same_to_readers([*classes, missing])
        if like is not None:
            return (
                f"{_where(shards, missing)} has the label {missing!a}, {origin} names {like[0]!a}, which reads the "
                "same; spell them alike"
            )
        return (
            f"{_where(shards, missing)} has the label {missing!r}, which {origin} doesn't name; correct the label, or "
            "write the list again with `python launch/shards.py classes SHARDS`"
        )
    return None


def _mixed(shards: Sequence[ShardIndex]) -> str | None:
    """Returns an error if some labels are numbers and some are names; None if all are of one kind."""
    text = next(text for shard in shards for text in shard.texts)
    for shard in shards:
        numbers = np.flatnonzero((shard.labels > TEXT_LABEL) & (shard.labels != NO_LABEL))
        if len(numbers):
            row = int(numbers[0])
            return (
                f"{shard.path}:{shard.keys[row]} has the label {shard.labels[row]}, {_where(shards, text)} the label "
                f"{text!r}; use either only numbers or only names"
            )
    return None


def _ambiguous(shards: Sequence[ShardIndex], names: list[str]) -> str | None:
    same = same_to_readers(names)
    if same is None:
        return None
    first, second = ((ascii(name), _where(shards, name)) for name in same)
    return f"labels {first[0]} of {first[1]} and {second[0]} of {second[1]} read the same; spell them alike"


def _where(shards: Sequence[ShardIndex], text: str) -> str:
    """Returns the name of the first sample with this label."""
    for shard in shards:
        if text in shard.texts:
            row = int(np.flatnonzero(shard.labels == TEXT_LABEL - shard.texts.index(text))[0])
            return f"{shard.path}:{shard.keys[row]}"
    raise AssertionError(f"no sample has the label {text!r}")


__all__ = ["CLASSES", "NumberedLabels", "names_in", "number_labels", "parse_classes", "read_classes"]

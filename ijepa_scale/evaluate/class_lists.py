"""Checks that the labels of two sets mean the same classes. Knows nothing of models."""

from __future__ import annotations

import logging

import numpy as np

from ijepa_scale.data.class_names import shortened
from ijepa_scale.data.sources.labels import class_warnings, same_to_readers, whole_number
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

_SHOWN = 3  # labels or names


def compare_classes(train: tuple[str, SampleSource], other: tuple[str, SampleSource], *, log: bool = True) -> None:
    """Checks that a label means the same class in two sets, given with the settings that name them.

    If the labels of the second set are names and it has no list, the first one's list numbers them. If only one set
    names its classes, the labels can only be compared as numbers, which is logged as a warning, as are labels that only
    the second set has. `log` is false on processes that leave this to another one.

    Raises:
        DataError: a set has no labels, both name their classes, but differently, or labels that are names can't be
            numbered.
    """
    (train_name, train_source), (name, source) = train, other
    ours = train_source.classes
    if ours is not None and isinstance(source, ShardSource) and source.has_text_labels and source.classes is None:
        source.number_by(ours, f"the class list of {train_name}")
    for setting, one in (train, other):
        require_labels(one, one.labels(), setting)
    theirs = source.classes
    if ours is not None and theirs is not None and ours != theirs:
        raise DataError(
            f"{train_name} and {name} have different classes ({_difference(ours, theirs)}), "
            "so their labels have different meanings; give both the same class folders or classes.json"
        )
    if (ours is None) != (theirs is None):
        names = ours or theirs or []
        numbers = [whole_number(text) for text in names]
        moved = next((place for place, number in enumerate(numbers) if number not in (place, None)), None)
        if None not in numbers and moved is not None:
            raise DataError(
                f"{train_name} and {name}: one has numbers for labels, the other classes called by numbers in another "
                f"order (label {moved} is class {names[moved]!r}), as sorted folders are; name folders with leading "
                "zeros, or give both the same classes.json"
            )
    if not log:
        return
    if (ours is None) != (theirs is None):
        named, unnamed = (train_name, name) if theirs is None else (name, train_name)
        logger.warning(
            "%s names its %d classes, %s doesn't, so labels are compared by number only; check that label 0 is %r in "
            "both, or give both the same class folders or classes.json",
            named, len(ours or theirs or ()), unnamed, (ours or theirs or [""])[0],
        )  # fmt: skip
    for line in class_warnings(theirs, name) if ours is None and theirs is not None else ():
        logger.warning("%s", line)
    only = np.setdiff1d(source.labels(), train_source.labels())
    if len(only):
        shown = ", ".join(f"{label} ({theirs[label]!r})" if theirs else str(label) for label in only[:_SHOWN].tolist())
        logger.warning(
            "%s has %d labels that no image of %s has (%s%s); check that both number the classes alike",
            name, len(only), train_name, shown, ", ..." if len(only) > _SHOWN else "",
        )  # fmt: skip


def require_labels(source: SampleSource, labels: np.ndarray, name: str) -> None:
    """Checks that a set has labels at all; `labels` are all of them, and `name` is the setting that names the set.

    Raises:
        DataError: it has none. Says what the set was read as.
    """
    if (labels < 0).all():
        count = len(labels)
        raise DataError(
            f"{name}: {count} of {count} images have no label (the first is {source.name(0)}): it was read as "
            f"{source.summary()}; give class folders, a CSV with path,label, or shards made from them (pretraining "
            "needs no labels with evaluate.every=0)"
        )


def _difference(ours: list[str], theirs: list[str]) -> str:
    """Returns, in words, how the lists differ: the first names that only one has, or the order."""
    only = sorted(set(ours) ^ set(theirs))
    same = same_to_readers(only)
    if same is not None:
        return f"{same[0]!a} and {same[1]!a} read the same; rename one of them"
    return f"only one has {', '.join(map(shortened, only[:_SHOWN]))}" if only else "in another order"


__all__ = ["compare_classes", "require_labels"]

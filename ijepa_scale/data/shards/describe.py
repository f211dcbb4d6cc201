"""Describes a set of shards in a few lines. Reads indices, not images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ijepa_scale.data.shards.byte_sizes import format_bytes
from ijepa_scale.data.shards.journal import JOURNAL
from ijepa_scale.data.sources.class_list import read_classes
from ijepa_scale.data.sources.labels import NO_LABEL, TEXT_LABEL, class_warnings
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.shard_manifest import read_manifest
from ijepa_scale.data.sources.tar_index import ShardIndex
from ijepa_scale.data.statistics import STATISTICS, read_statistics
from ijepa_scale.plurals import counted

_SHOWN = 5  # problems


def describe_shards(shards: list[ShardIndex], problems: Problems) -> list[str]:
    """Returns lines that describe counts, sizes, labels and classes of usable shards, and the problems of the set.

    Raises:
        DataError: a file isn't a manifest or a list of classes though its name says so.
    """
    tar_bytes = np.array([shard.tar_bytes for shard in shards])
    sizes = np.concatenate([shard.sizes for shard in shards])
    rows = [
        ("shards", f"{len(shards)} of {_span(tar_bytes)}, {format_bytes(tar_bytes.sum())} in all"),
        (
            "images",
            f"{len(sizes)} of {_span(sizes)}, {format_bytes(sizes.mean())} on average" if len(sizes) else "none",
        ),
        *_label_rows(shards),
        *(
            row
            for folder in sorted({shard.path.parent for shard in shards})
            for row in _folder_rows(folder, shards, problems)
        ),
    ]
    counts = ", ".join(f"{count} x {kind}" for kind, count in problems.counts.most_common())
    rows.append(("not read", problems.passed_over() or "none"))
    rows.append(("problems", counts or "none"))
    rows += [("", f"{problem.name}: {problem.reason}") for problem in problems.named[:_SHOWN]]
    return [f"{name:<17} {text}".rstrip(" ") for name, text in rows]


def _label_rows(shards: list[ShardIndex]) -> list[tuple[str, str]]:
    images: Counter[int | str] = Counter()
    for shard in shards:
        for label, count in zip(*np.unique(shard.labels, return_counts=True), strict=True):
            images[shard.texts[TEXT_LABEL - label] if label <= TEXT_LABEL else int(label)] += int(count)
    unlabelled = images.pop(NO_LABEL, 0)
    without = f"; {counted(unlabelled, 'image')} without" if unlabelled else ""
    names = sorted(label for label in images if isinstance(label, str))
    numbers = [label for label in images if isinstance(label, int)]
    found = [f"{len(numbers)}, from {min(numbers)} to {max(numbers)}"] if numbers else []
    found += [f"{len(names)} names, {_first(names)}"] if names else []
    if not found:
        return [("labels", f"none{without}")]
    counts = list(images.values())
    middle = f"{np.median(counts):.1f}".removesuffix(".0")
    return [
        ("labels", f"{'; '.join(found)}{without}"),
        ("images per label", f"min {min(counts)}, median {middle}, max {max(counts)}"),
    ]


def _folder_rows(folder: Path, shards: list[ShardIndex], problems: Problems) -> list[tuple[str, str]]:
    """Returns rows on the class names and manifest of one folder, and whether they match its shards."""
    here = {shard.path.name: shard for shard in shards if shard.path.parent == folder}
    classes, manifest = read_classes(folder), read_manifest(folder)
    rows = []
    if classes is not None:
        largest = max((int(shard.labels.max()) for shard in here.values() if len(shard)), default=NO_LABEL)
        text = f"{len(classes)} names, {_first(classes)}"
        rows.append(("classes", text if largest < len(classes) else f"{text}; but there is a label {largest}"))
        rows += [("", line) for line in class_warnings(classes, "the list")]
    if (folder / STATISTICS).is_file():
        found = read_statistics(folder / STATISTICS)
        rows.append(
            ("pixels", f"{found.channels} of {found.dtype}, measured on {counted(found.images, 'image')}: {STATISTICS}")
        )
    if manifest is None:
        rows.append(("manifest", "unfinished: run make again" if (folder / JOURNAL).exists() else "none"))
        return rows
    other = [
        name
        for name, shard in here.items()
        if name not in manifest or (manifest[name].bytes, manifest[name].samples) != (shard.tar_bytes, len(shard))
    ]
    unusable = {problem.name for problem in problems.named if problem.kind in ("changed shard", "empty shard")}
    other += [name for name in manifest if str(folder / name) in unusable]
    fits = f"doesn't match {', '.join(sorted(other)[:_SHOWN])}" if other else "matches in sizes and counts"
    missing = [name for name in manifest if not (folder / name).exists()]
    rows.append(("manifest", f"{fits}; lists {len(missing)} missing shards" if missing else fits))
    return rows


def _span(values: np.ndarray) -> str:
    low, high = (format_bytes(value) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown


__all__ = ["describe_shards"]

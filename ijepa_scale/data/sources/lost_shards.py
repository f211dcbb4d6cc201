"""Tells which shards of a set can be used, and counts the samples of the others. Reads no image."""

from __future__ import annotations

from pathlib import Path

from ijepa_scale.data.sources.scan import Members, Problems
from ijepa_scale.data.sources.shard_manifest import MANIFEST, ShardRow, expected_shards
from ijepa_scale.data.sources.tar_index import ShardIndex, index_tar
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted

_REMEDY = "copy it again, or make the set again"


def usable_shards(
    paths: list[Path], members: Members | None, pattern: str | Path | None
) -> tuple[list[ShardIndex], dict[Path, ShardRow], Problems]:
    """Returns the indices of the usable shards, the manifests' rows by path, and what is lost with the other shards.

    A shard that its manifest names and that is missing, empty, not a tar or of another size costs the samples that the
    manifest counts; one that was only cut short costs what it has lost. An empty one without a manifest costs as many
    as the other shards have on average, since nobody knows how many it had.

    Raises:
        DataError: a shard without a row in a manifest can't be read, or a manifest can't.
    """
    expected = expected_shards(paths, pattern)
    lost = Problems(doubts=expected.doubts)
    for path, named in expected.missing:
        reason = f"{MANIFEST} names it, with {counted(named.samples, 'sample')}; {_REMEDY}"
        lost.add("missing shard", str(path), reason, named.samples)
    found: list[ShardIndex] = []
    unknown: list[Path] = []
    for path in paths:
        row = expected.rows.get(path)
        try:
            index = index_tar(path, members)
        except DataError as error:
            if row is None:
                raise
            lost.add(
                "unreadable shard",
                str(path),
                f"{error}; {MANIFEST} counts {counted(row.samples, 'sample')}",
                row.samples,
            )
            continue
        if index.tar_bytes == 0 and row is None:
            unknown.append(path)
        elif row is not None and index.tar_bytes == 0:
            lost.add("empty shard", str(path), f"0 bytes, instead of {row.samples} samples; {_REMEDY}", row.samples)
        elif row is not None and index.tar_bytes != row.bytes and "cut short" not in index.problems.counts:
            reason = f"{index.tar_bytes} bytes, but {MANIFEST} says {row.bytes}; {_REMEDY}"
            lost.add("changed shard", str(path), reason, row.samples)
        else:
            found.append(index)
    average = round(sum(map(len, found)) / max(1, len(found)))
    for path in unknown:
        reason = f"0 bytes, counted like an average shard of {average} samples; copy it again, or remove it"
        lost.add("empty shard", str(path), reason, max(1, average))
    return found, expected.rows, lost


def problems_of(shards: list[ShardIndex], rows: dict[Path, ShardRow], lost: Problems) -> Problems:
    """Returns what of a set can't be used: in its usable shards, what `usable_shards` lost, and what cut ones lack."""
    found = Problems()
    found.extend(lost)
    for shard in shards:
        found.extend(shard.problems)
        row = rows.get(shard.path)
        if row is not None and "cut short" in shard.problems.counts:
            lacking = row.samples - len(shard) - shard.problems.counts.total()
            if lacking > 0:
                reason = f"{MANIFEST} counts {counted(row.samples, 'sample')}"
                found.add("lost with the end of a shard", str(shard.path), reason, lacking)
    return found


__all__ = ["problems_of", "usable_shards"]

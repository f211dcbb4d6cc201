"""Reads the manifest of a set of shards, and holds the shards that are there against it. Reads no shard."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted
from ijepa_scale.regular_file import read_regular

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardRow:
    """A shard's row in the manifest."""

    name: str
    bytes: int
    samples: int
    sha256: str


_HEAD = {"version", "samples"}  # keys of a manifest besides its rows


class _OtherFileError(ValueError):
    """A file of this name that another program wrote."""


def parse_manifest(content: bytes, *, remote: bool = False) -> list[ShardRow]:
    """Returns the rows of a manifest. In one of a `remote` set "samples" may lack, which is then 0.

    Raises:
        ValueError: it is no manifest, a name isn't one of a file next to it or, in a `remote` set, below it, or a value
            is of another kind, such as a number in quotes.
    """
    manifest = parse_json(content)
    rows = manifest.get("shards") if isinstance(manifest, dict) else None
    if not isinstance(rows, list):
        raise _OtherFileError('it has no list "shards"')
    if not remote and not _HEAD <= manifest.keys() and not all(_is_full(row) for row in rows):
        raise _OtherFileError('its list "shards" hasn\'t name, bytes, samples and sha256 of each')
    found: dict[str, ShardRow] = {}
    for number, row in enumerate(rows):
        values: dict[str, Any] = {}
        for one in dataclasses.fields(ShardRow):
            value = row.get(one.name) if isinstance(row, dict) else None
            if value is None and one.name == "samples" and remote:
                value = 0
            if type(value).__name__ != one.type or (isinstance(value, int) and value < 0):
                wanted = "a text" if one.type == "str" else "a whole number from 0"
                raise ValueError(f'"{one.name}" of shard {number} is {value!r}, not {wanted}')
            values[one.name] = value
        name = values["name"]
        parts = name.split("/") if remote else [name]
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            raise ValueError(f'"name" of shard {number} is {name!r}, not the name of a file')
        if name in found:
            raise ValueError(f"shard {name!r} is in it twice")
        found[name] = ShardRow(**values)
    return list(found.values())


def _is_full(row: Any) -> bool:
    return isinstance(row, dict) and row.keys() >= {one.name for one in dataclasses.fields(ShardRow)}


def read_manifest(folder: Path) -> dict[str, ShardRow] | None:
    """Returns the manifest's rows by shard name; None if a folder has no manifest.

    Raises:
        DataError: it can't be read, or isn't a manifest of shards.
    """
    try:
        return {row.name: row for row in parse_manifest(read_regular(folder / MANIFEST))}
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _not_a_manifest(folder, error) from None


@dataclass
class Expected:
    """What the manifests say of shards."""

    rows: dict[Path, ShardRow] = field(default_factory=dict)  # of the shards that are there and in a manifest
    missing: list[tuple[Path, ShardRow]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def expected_shards(paths: list[Path], pattern: str | Path | None = None) -> Expected:
    """Returns what the manifests next to these shards say of them.

    `pattern` is the folder or the glob that has named them, and tells which other shards it means too.

    Raises:
        DataError: a manifest can't be read or is damaged. A file of that name by another program is a doubt.
    """
    found = Expected()
    whole = None if pattern is None else "*" if os.path.isdir(pattern) else os.path.basename(pattern)
    for folder in sorted({path.parent for path in paths}):
        try:
            rows = {row.name: row for row in parse_manifest(read_regular(folder / MANIFEST))}
        except FileNotFoundError:
            continue
        except _OtherFileError as error:
            found.doubts.append(f"{folder / MANIFEST} says nothing about shards ({error}), so it isn't used")
            continue
        except (OSError, ValueError) as error:
            raise _not_a_manifest(folder, error) from None
        here = {path.name: path for path in paths if path.parent == folder}
        found.rows |= {path: rows[name] for name, path in here.items() if name in rows}
        if whole is not None:
            found.missing += [
                (folder / name, row)
                for name, row in rows.items()
                if name not in here and fnmatch.fnmatchcase(name, whole) and not os.path.lexists(folder / name)
            ]
        unnamed = sorted(here.keys() - rows.keys())
        if unnamed:
            found.doubts.append(
                f"{folder}: {MANIFEST} doesn't name {counted(len(unnamed), 'shard')}, like {unnamed[0]}, which "
                f"{'is' if len(unnamed) == 1 else 'are'} read unchecked: move what isn't meant away, or make the set "
                "again"
            )
    return found


def _not_a_manifest(folder: Path, error: Exception) -> DataError:
    why = error.strerror if isinstance(error, OSError) else error
    return DataError(f"{folder / MANIFEST} isn't a manifest of shards ({why}); copy it again, or remove it")


__all__ = ["MANIFEST", "Expected", "ShardRow", "expected_shards", "parse_manifest", "read_manifest"]

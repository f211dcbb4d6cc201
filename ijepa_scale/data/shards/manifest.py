"""Reads the manifest and the class names of a set of shards."""

from __future__ import annotations

from pathlib import Path

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.shards.write import ShardRow
from ijepa_scale.data.sources.class_list import CLASSES, parse_classes
from ijepa_scale.data.sources.tar_shards import MANIFEST
from ijepa_scale.errors import DataError


def read_manifest(folder: Path) -> dict[str, ShardRow] | None:
    """Returns the manifest's rows by shard name; None if a folder has no manifest.

    Raises:
        DataError: it can't be read, or isn't a manifest of shards.
    """
    path = folder / MANIFEST
    try:
        rows = parse_json(path.read_bytes())["shards"]
        found = [ShardRow(str(r["name"]), int(r["bytes"]), int(r["samples"]), str(r["sha256"])) for r in rows]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise DataError(
            f"{path} isn't a manifest of shards ({type(error).__name__}: {error}); copy it again, or remove it"
        ) from None
    return {row.name: row for row in found}


def read_classes(folder: Path) -> list[str] | None:
    """Returns the class names stored next to the shards of a folder; None if there are none.

    Raises:
        DataError: the file isn't a list of names.
    """
    path = folder / CLASSES
    return parse_classes(path.read_bytes(), str(path)) if path.is_file() else None


__all__ = ["read_classes", "read_manifest"]

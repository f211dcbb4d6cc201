"""Reads the manifest of a set of shards."""

from __future__ import annotations

from pathlib import Path

from ijepa_scale.data.sources.tar_shards import MANIFEST, ShardRow, parse_manifest
from ijepa_scale.errors import DataError
from ijepa_scale.regular_file import read_regular


def read_manifest(folder: Path) -> dict[str, ShardRow] | None:
    """Returns the manifest's rows by shard name; None if a folder has no manifest.

    Raises:
        DataError: it can't be read, or isn't a manifest of shards.
    """
    path = folder / MANIFEST
    try:
        return {row.name: row for row in parse_manifest(read_regular(path))}
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} isn't a manifest of shards ({why}); copy it again, or remove it") from None


__all__ = ["read_manifest"]

"""Tells whether the files of an image set are the same as before. Reads no image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.tar_shards import ShardSource


def contents_of(source: SampleSource) -> str:
    """Returns a hash that changes with the list of samples, and with the path, size or time of any of their files.

    A source's fingerprint stays the same when files move or are replaced; what was computed of them needs this one.
    """
    names = source.files() if isinstance(source, ShardSource) else map(source.name, range(source.num_samples))
    return f"{source.fingerprint}-{digest_of_stats(names)}"


def digest_of_stats(names: Iterable[str | Path]) -> str:
    """Returns a hash of the absolute paths, sizes and times of files; one that isn't there counts by its path alone."""
    digest = hashlib.sha256()
    for name in names:
        try:
            status = os.stat(name)
            marks = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            marks = "none"
        digest.update(os.fsencode(os.path.abspath(name)) + f"\0{marks}\n".encode())
    return digest.hexdigest()

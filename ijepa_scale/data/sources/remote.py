"""Reads samples from remote tar shards, fetched whole and a window ahead into a bounded cache."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_scale.data.formats import junk
from ijepa_scale.data.sources.cache import FileCache, Handle, RemoteFile
from ijepa_scale.data.sources.class_list import CLASSES, parse_classes
from ijepa_scale.data.sources.fetch import (
    NotThereError,
    OtherContentError,
    check_address,
    fetch,
    remote_size,
    shown,
)
from ijepa_scale.data.sources.hashes import HashedShards
from ijepa_scale.data.sources.private import is_private, make_private
from ijepa_scale.data.sources.scan import Members, Problems
from ijepa_scale.data.sources.shard_manifest import MANIFEST, parse_manifest
from ijepa_scale.data.sources.tar_index import (
    ShardIndex,
    braces,
    index_address,
    index_path,
    is_tar,
    largest_index,
    load_index,
    save_index,
    scan_index,
)
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError, ShardError

logger = logging.getLogger(__name__)

_PARALLEL = 8  # indices fetched at once
_LARGEST_TEXT = 256 << 20  # bytes of a manifest


class RemoteShardSource(ShardSource):
    """The samples of tar shards behind https, s3, gs or hf addresses.

    Each shard is downloaded whole, and only once per machine while the cache holds it. It is checked against the
    manifest next to the shards if there is one, else against the size that the server reports. Its index is
    downloaded from `NAME.tar.idx.npz` (written by `launch/shards.py`) if that exists, else built from the shard.
    """

    def __init__(self, pattern: str, cache: FileCache, members: Members | None = None, *, hashed: bool = True) -> None:
        self._cache = cache
        self._hashed = HashedShards() if hashed else None
        self._rows, self._lost = {}, Problems()
        self._gone: dict[int, ShardError] = {}
        self._remote = list_remote(pattern, cache)
        logger.info("%d remote shards; cache %s", len(self._remote), cache.folder)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            shards = list(pool.map(lambda file: remote_index(file, cache, members), self._remote))
        self._take(shards, [file.url.rpartition("/")[2] for file in self._remote])
        classes_url = f"{self._remote[0].url.rpartition('/')[0]}/{CLASSES}"
        content = _text(classes_url, cache)
        self._name_classes(None if content is None else parse_classes(content, shown(classes_url)), shown(classes_url))

    def check_room(self, window_shards: int) -> None:
        """Checks that the cache can hold the current window and the next one.

        Raises:
            DataError: the cache is too small.
        """
        largest = sorted((shard.tar_bytes for shard in self._shards), reverse=True)
        needed = sum(largest[: 2 * window_shards])
        if needed > self._cache.max_bytes:
            raise DataError(
                f"data.cache_gb is {self._cache.max_bytes / (1 << 30):.3g} but two windows of {window_shards} shards "
                f"need {needed / (1 << 30):.3g} GiB; raise it, or lower data.window_shards"
            )

    def name(self, sample_id: int) -> str:
        """Returns the shard's address and the sample's key."""
        shard, row = self._locate(sample_id)
        return f"{shown(self._remote[shard].url)}:{self._shards[shard].keys[row]}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Starts to fetch the shards, and closes all others so that the cache may remove them."""
        needed = [int(shard) for shard in [*now, *soon]]
        for shard in [shard for shard in self._files if shard not in needed]:
            self._files.pop(shard).close()
        files = [self._remote[shard] for shard in needed if not self._cache.has(self._remote[shard].url)]
        if files:
            threading.Thread(target=_fetch_ahead, args=(self._cache, files), daemon=True).start()

    def _open(self, shard: int) -> Handle:
        if shard in self._gone:
            raise self._gone[shard]
        try:
            return self._opened(self._remote[shard])
        except (NotThereError, OtherContentError) as error:  # fetching it for each of its samples would take for ever
            self._gone[shard] = ShardError(f"shard {error}", "changed shard", self._title(shard))
            raise self._gone[shard] from None

    def _opened(self, file: RemoteFile) -> Handle:
        """Returns the open shard; one of an earlier run that was damaged since is fetched again."""
        handle = self._cache.open(file)
        if file.sha256 is None or self._hashed is None:
            return handle
        status = os.fstat(handle.descriptor)
        path = self._cache.path(file.url)
        identity = status.st_dev, status.st_ino, status.st_size  # each opening sets the times
        if self._hashed.matches(path, handle.descriptor, identity, file.sha256):
            return handle
        handle.close()
        logger.warning("%s: the copy in the cache differs from the manifest, so it is fetched again", shown(file.url))
        self._cache.discard(file.url, status)
        handle = self._cache.open(file)
        status = os.fstat(handle.descriptor)
        self._hashed.accept(path, (status.st_dev, status.st_ino, status.st_size), file.sha256)  # compared when fetched
        return handle

    def _check_same(self, index: ShardIndex) -> None:
        """Does nothing: an open file of the cache doesn't change."""

    def _title(self, shard: int) -> str:
        return shown(self._remote[shard].url)


def list_remote(pattern: str, cache: FileCache) -> list[RemoteFile]:
    """Returns the shards that an address names: one, a `{000..127}` pattern, or a folder with a manifest.json.

    Raises:
        DataError: an address that isn't supported, or a folder without a manifest.
    """
    check_address(pattern)
    names = sorted(set(braces(pattern)))
    is_folder = not is_tar(names[0])
    folder = names[0].rstrip("/") if is_folder else names[0].rpartition("/")[0]
    known = _manifest(f"{folder}/{MANIFEST}", cache, required=is_folder)
    if is_folder:
        names = [f"{folder}/{name}" for name in sorted(known) if junk(name) is None]
    if not names:
        raise DataError(f"{shown(folder)}/{MANIFEST} names no shards; write it again with launch/shards.py")
    return [RemoteFile(name, *known.get(name.removeprefix(f"{folder}/"), (None, None))) for name in names]


def _manifest(url: str, cache: FileCache, *, required: bool) -> dict[str, tuple[int, str]]:
    """Returns (bytes, SHA-256) by shard name."""
    content = _text(url, cache)
    if content is None:
        if required:
            raise DataError(
                f"{shown(url)} doesn't exist, but a remote folder needs it; add it, or name shards, like "
                ".../{000..127}.tar"
            )
        return {}
    try:
        return {row.name: (row.bytes, row.sha256) for row in parse_manifest(content, remote=True)}
    except ValueError as error:
        raise DataError(
            f"{shown(url)} isn't a manifest of shards ({error}); write it again with launch/shards.py"
        ) from None


def _text(url: str, cache: FileCache) -> bytes | None:
    """Returns the content of a small remote file; None if it doesn't exist."""
    to = cache.folder / "index" / f"{cache.path(url).name}-{os.getpid()}-{threading.get_native_id()}"
    make_private(to.parent)
    try:
        fetch(url, to, size=None, sha256=None, retry=cache.retry, largest=_LARGEST_TEXT)
        return to.read_bytes()
    except NotThereError:
        return None
    finally:
        to.unlink(missing_ok=True)


def remote_index(file: RemoteFile, cache: FileCache, members: Members | None = None) -> ShardIndex:
    """Returns the index of a remote shard: from the cache, else from the server, else built from the fetched shard.

    Raises:
        DataError: the shard can't be fetched or isn't a tar.
    """
    path = cache.path(file.url)
    kept = cache.folder / "index" / index_path(path, members).name
    make_private(kept.parent)
    size = remote_size(file.url, cache.retry) if file.size is None else file.size
    found = load_index(kept, path, size, None) if kept.exists() and is_private(kept.stat()) else None
    if found is None:
        kept.unlink(missing_ok=True)
        new = kept.with_name(f"{kept.name}.{os.getpid()}-{threading.get_native_id()}")
        quick = dataclasses.replace(cache.retry, attempts=min(3, cache.retry.attempts))
        try:
            fetch(
                index_address(file.url, members), new, size=None, sha256=None, retry=quick, largest=largest_index(size)
            )
            found = load_index(new, path, size, None)
        except DataError as error:
            logger.info("%s: no index next to it (%s); reading the shard", shown(file.url), error)
        finally:
            new.unlink(missing_ok=True)
    if found is None:
        handle = cache.open(file)
        try:
            scanned = scan_index(path, path.stat(), members)
            found = dataclasses.replace(scanned, tar_mtime_ns=None)
        finally:
            handle.close()
    if not kept.exists():
        save_index(found, kept)
    return found


def _fetch_ahead(cache: FileCache, files: list[RemoteFile]) -> None:
    """Fetches files that will be read soon. Only logs failures: the later read reports them."""
    begin = threading.get_native_id() % len(files)  # workers start with different files, not all behind one lock
    for file in files[begin:] + files[:begin]:
        try:
            cache.open(file).close()
        except DataError as error:
            logger.warning("%s", error)


def open_cache(folder: str | None, gigabytes: float, pattern: str, **options: Any) -> FileCache:
    """Returns the cache of a run.

    Raises:
        DataError: no folder is named.
    """
    if folder is None:
        raise DataError(
            f"{shown(pattern)!r} is remote and data.cache is null; name a folder for fetched shards: data.cache=DIR"
        )
    return FileCache(Path(folder), int(gigabytes * (1 << 30)), **options)

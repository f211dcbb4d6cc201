"""Downloads the published weights into a cache, once per host, and checks on each use that they are still the same."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ijepa_scale.checkpoint.file_kinds import check_kind
from ijepa_scale.checkpoint.published_files import ADDRESS, FILES, LICENCE_TEXT, PUBLISHED, PublishedFile
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.sources.fetch import Retry, fetch_resumable, file_sha256
from ijepa_scale.environment import cache_folder
from ijepa_scale.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

_STEPS = 20  # of the download that are logged
RETRY = Retry(redirect_hosts=None)


def published_path(name: str, check: Callable[[Path, PublishedFile], None]) -> Path:
    """Returns the path of `published:NAME` in the cache, after downloading it if it isn't there.

    One process of a host downloads while others wait. A transfer that was cut goes on where it stopped, now or in a
    later call. `check` looks at a downloaded file before it gets its name. No hashes of the published files are known
    here: the one of the first download is recorded next to the file, and each later use is checked against it.

    Raises:
        CheckpointError: the name is unknown, the file can't be downloaded, is another one, or has changed since.
    """
    key = name.removeprefix(PUBLISHED)
    if key not in FILES:
        near = difflib.get_close_matches(key, FILES, n=1, cutoff=0.0)[0]
        raise CheckpointError(f"{name} isn't known; did you mean {PUBLISHED}{near}? Choose from {', '.join(FILES)}")
    known = FILES[key]
    path = cache_folder() / "published" / known.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                _download(path, known, check)
            elif not _record(path).exists():
                _check_given(path, known, check)
            _verify(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be used ({error}); free space, or set IJEPA_SCALE_CACHE to another folder"
        ) from None
    return path


def _download(path: Path, known: PublishedFile, check: Callable[[Path, PublishedFile], None]) -> None:
    url, part = ADDRESS + known.file, path.with_name(f"{path.name}.part")
    logger.warning("%s: the licence of these weights is %s", known.file, LICENCE_TEXT)
    logged = -1

    def progress(done: int, size: int) -> None:
        nonlocal logged
        free = shutil.disk_usage(part.parent).free
        if free < size - done:
            raise DataError(
                f"{url} needs {(size - done) / 1e9:.1f} GB more, and {part.parent} has {free / 1e9:.1f} GB; free "
                "space, or set IJEPA_SCALE_CACHE to another folder"
            )
        if done * _STEPS // size != logged:
            logged = done * _STEPS // size
            logger.warning("%s: %.1f of %.1f GB", url, done / 1e9, size / 1e9)

    try:
        fetch_resumable(url, part, retry=RETRY, progress=progress)
    except DataError as error:
        kept = part.stat().st_size if part.exists() else 0
        raise CheckpointError(f"{error}; {kept / 1e9:.2f} GB are kept, to go on from" if kept else str(error)) from None
    try:
        _check_whole(part)
        check(part, known)
    except CheckpointError as error:
        part.unlink()
        raise CheckpointError(
            f"{url} isn't the published file, and was removed: {str(error).removeprefix(f'{part} ')}"
        ) from None
    found = {"url": url, "bytes": part.stat().st_size, "sha256": file_sha256(part), "licence": LICENCE_TEXT}
    _record(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
    logger.warning("%s: SHA-256 %s, recorded for later uses; no published hash is known", path, found["sha256"])


def _check_given(path: Path, known: PublishedFile, check: Callable[[Path, PublishedFile], None]) -> None:
    """Checks a file that was put there by hand before its hash is recorded, and leaves it there.

    Raises:
        CheckpointError: it isn't the published one.
    """
    try:
        _check_whole(path)
        check(path, known)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} was put there by hand and isn't the published file ({str(error).removeprefix(f'{path} ')}); "
            "replace it, or remove it to download it"
        ) from None


def _check_whole(path: Path) -> None:
    """Checks that a file is a PyTorch file whose members all have their checksums.

    Raises:
        CheckpointError: it isn't.
    """
    check_kind(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} isn't a file of torch.save; try again later, or download it yourself")
    with zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            damaged = str(error)
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged at {damaged}; try again")


def _verify(path: Path) -> None:
    """Checks a file against its record; makes one for a file that was put there by hand.

    Raises:
        CheckpointError: it has changed. It is removed then.
    """
    record, found = _record(path), {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    try:
        wanted = parse_json(record.read_bytes())
        wanted = {name: wanted[name] for name in found}
    except FileNotFoundError:
        record.write_text(
            json.dumps({"url": None, **found, "licence": LICENCE_TEXT}, indent=2) + "\n", encoding="utf-8"
        )
        logger.warning("%s: SHA-256 %s, recorded for later uses; no published hash is known", path, found["sha256"])
        return
    except (ValueError, LookupError, TypeError):
        raise CheckpointError(f"{record} can't be read; remove it if {path.name} is the file that you want") from None
    if found != wanted:
        path.unlink()
        record.unlink()
        raise CheckpointError(
            f"{path} has changed since its first use: {found['bytes']} bytes with SHA-256 {found['sha256']} instead of "
            f"{wanted['bytes']} with {wanted['sha256']}; it was removed: run again to download it"
        )


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the file's lock; says so if another process has it. A process that dies releases it."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process that downloads or checks it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)

"""Brings one remote file here whole, or says why not. Files and a network, no processes and no tensors.

Addresses go through fsspec: https, s3, gs, hf. Transient faults are tried again, with growing pauses; what comes is
held against the size and hash that are known of it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import urllib.parse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ijepa_scale import rng
from ijepa_scale.errors import DataError

logger = logging.getLogger(__name__)

PACKAGES = {"https": "fsspec[http]", "http": "fsspec[http]", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_ADDRESS = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_CHUNK = 1 << 20
_TRY_AGAIN = {408, 425, 429}  # of the client errors; all server errors are


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often a transfer is tried, and how long nothing may happen."""

    attempts: int = 8
    first_pause_s: float = 1.0  # doubled each time, up to
    longest_pause_s: float = 30.0
    timeout_s: float = 60.0  # without a byte


class NotThereError(DataError):
    """The server says that the file isn't there, or not for us."""


class _Wrong(Exception):
    """What came isn't what was announced."""


def scheme_of(text: str) -> str | None:
    """Returns the scheme of a remote address; None for a local path."""
    found = _ADDRESS.match(text)
    if found is None:
        return "hf" if text.startswith("hf:") else None
    return found[1].lower()


def check_address(url: str) -> None:
    """Refuses addresses that aren't fetched.

    Raises:
        DataError: an unknown scheme, or http to another machine.
    """
    scheme = scheme_of(url)
    if scheme not in PACKAGES:
        raise DataError(f"{url!r} has the scheme {scheme!r}; give a local path, or one of {', '.join(PACKAGES)}")
    host = urllib.parse.urlsplit(url).hostname
    if scheme == "http" and host not in _LOOPBACK:
        raise DataError(f"{url!r} is unencrypted; give https, or copy the shards to a local folder")


def remote_size(url: str, retry: Retry) -> int:
    """Returns the bytes that the server says the file has.

    Raises:
        DataError: it can't be had, or has no size.
    """
    size = _persist(url, retry, lambda filesystem, path: filesystem.info(path)["size"])
    if not isinstance(size, int):
        raise DataError(f"{url} has no size; serve it with a Content-Length, or copy it to a local folder")
    return size


def fetch(url: str, to: Path, *, size: int | None, sha256: str | None, retry: Retry, largest: int) -> None:
    """Writes the file to `to`, whole and checked, or leaves nothing there.

    A broken transfer starts again from its beginning. No more than `largest` bytes are taken, whatever is sent.

    Raises:
        DataError: it isn't there, may not be read, or didn't arrive whole in `retry.attempts` tries.
    """

    def transfer(filesystem: Any, path: str) -> None:
        most = largest if size is None else size
        filesystem.get_file(path, str(to), callback=_capped(most))
        found = to.stat().st_size
        if size is not None and found != size:
            raise _Wrong(f"{found} bytes came instead of {size}")
        if sha256 is not None and file_sha256(to) != sha256:
            raise _Wrong("its SHA-256 is another than the manifest's")

    try:
        _persist(url, retry, transfer)
    except BaseException:
        to.unlink(missing_ok=True)
        raise


def open_remote(url: str, retry: Retry) -> IO[bytes]:
    """Returns the file as a stream that is read once, from its beginning.

    Raises:
        DataError: it can't be opened.
    """
    opened = _persist(url, retry, lambda filesystem, path: filesystem.open(path, "rb", cache_type="readahead"))
    return cast(IO[bytes], opened)


def file_sha256(path: Path) -> str:
    """Returns the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _capped(most: int) -> Any:
    """Returns a progress callback that ends a transfer of more than `most` bytes."""
    from fsspec.callbacks import Callback

    class Cap(Callback):
        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            if self.value > most:
                raise _Wrong(f"over {most} bytes came")

    return Cap()


def _persist(url: str, retry: Retry, work: Callable[[Any, str], Any]) -> Any:
    """Returns work(filesystem, path), tried again after transient faults."""
    check_address(url)
    for attempt in range(retry.attempts):
        try:
            return work(*_filesystem(url, retry))
        except DataError:
            raise
        except Exception as raised:  # every filesystem raises its own; permanent ones are told apart below
            error = raised.__cause__ or raised  # fsspec says "not found" of any failure to ask for a size
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ImportError):
                raise DataError(
                    f"{url} needs {PACKAGES[str(scheme_of(url))]} ({reason}); install it with pip"
                ) from None
            if _permanent(error):
                text = f"{url} can't be fetched ({reason}); check the address and the permissions"
                raise NotThereError(text) from None
            if attempt + 1 == retry.attempts:
                raise DataError(
                    f"{url} didn't arrive in {retry.attempts} tries (the last: {reason}); check the server and the line"
                ) from None
            pause = min(retry.longest_pause_s, retry.first_pause_s * 2**attempt)
            # not all processes at once: a pause of half to all of it, another for each address
            place = np.array([zlib.crc32(url.encode())])
            pause *= 0.5 + 0.5 * float(rng.uniform(0, "fetch", attempt, place, 1)[0, 0])
            logger.warning("%s: %s; trying again in %.1f s", url, reason, pause)
            time.sleep(pause)
    raise AssertionError


def _filesystem(url: str, retry: Retry) -> tuple[Any, str]:
    """Returns fsspec's filesystem for an address, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    scheme = scheme_of(url)
    if scheme in ("https", "http"):
        import aiohttp

        waits = aiohttp.ClientTimeout(total=None, sock_connect=retry.timeout_s, sock_read=retry.timeout_s)
        options = {"client_kwargs": {"timeout": waits}}
    elif scheme == "s3":
        options = {"config_kwargs": {"connect_timeout": retry.timeout_s, "read_timeout": retry.timeout_s}}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


def _permanent(error: BaseException) -> bool:
    """Returns whether trying again is useless."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return True
    response = getattr(error, "response", None)  # botocore's is a mapping
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _TRY_AGAIN

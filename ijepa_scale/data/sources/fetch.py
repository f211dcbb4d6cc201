"""Downloads one remote file whole, or reports why it can't. Knows nothing of processes or tensors.

fsspec handles the addresses: https, s3, gs, hf. Transient errors are retried, with growing pauses; the result is
compared with the size and hash of the file, if they are known. No redirect leads from https to http, or to a server
that isn't named.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import ssl
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
_SECRETS = re.compile(r"""([a-zA-Z][\w+.-]*://)(?:[^\s/?#]*@)?([^\s?#'"<>]*)(?:[?#][^\s'"<>]*)?""")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_CHUNK = 1 << 20
_TRY_AGAIN = {408, 425, 429}  # client errors that are retried, like all server errors
_RANGE = 1 << 24  # bytes of one request of `fetch_resumable`
_TRUSTED: ssl.SSLContext | None = None  # certificate authorities; None: those of the system


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often a transfer is tried, how long the pauses are, when it times out, and where it may be sent on to."""

    attempts: int = 8
    first_pause_s: float = 1.0  # doubled after each attempt, up to `longest_pause_s`
    longest_pause_s: float = 30.0
    timeout_s: float = 60.0  # without receiving a byte
    redirect_hosts: tuple[str, ...] | None = ()  # HOST or HOST:PORT, besides the address's own; None: can't be set


class NotThereError(DataError):
    """The server says that the file doesn't exist or that access is denied."""


class OtherContentError(DataError):
    """A file doesn't have the size or the hash that is known of it, however often it is fetched."""


class _WrongContent(Exception):
    """The received bytes don't have the expected size or hash."""


def scheme_of(text: str) -> str | None:
    """Returns the scheme of a remote address; None for a local path."""
    found = _ADDRESS.match(text)
    if found is None:
        return "hf" if text.startswith("hf:") else None
    return found[1].lower()


def check_address(url: str) -> None:
    """Checks that an address can be fetched.

    Raises:
        DataError: an unknown scheme, or http to another machine.
    """
    scheme = scheme_of(url)
    if scheme not in PACKAGES:
        raise DataError(f"{shown(url)!r} has the scheme {scheme!r}; use a local path, or one of {', '.join(PACKAGES)}")
    host = urllib.parse.urlsplit(url).hostname
    if scheme == "http" and host not in _LOOPBACK:
        raise DataError(f"{shown(url)!r} is unencrypted; use https, or copy the shards to a local folder")


def remote_size(url: str, retry: Retry) -> int:
    """Returns the size in bytes that the server reports for a file.

    Raises:
        DataError: the file can't be fetched, or has no size.
    """
    size = _persist(url, retry, lambda filesystem, path: filesystem.info(path)["size"])
    if not isinstance(size, int):
        raise DataError(f"{shown(url)} has no size; serve it with a Content-Length, or copy it to a local folder")
    return size


def fetch(url: str, to: Path, *, size: int | None, sha256: str | None, retry: Retry, largest: int) -> None:
    """Downloads the file to `to`, whole and checked, or leaves nothing there.

    A broken transfer starts again from the beginning. Accepts at most `largest` bytes, however many the server sends.

    Raises:
        DataError: the file doesn't exist, may not be read, or didn't arrive whole in `retry.attempts` attempts.
    """

    def transfer(filesystem: Any, path: str) -> None:
        most = largest if size is None else size
        filesystem.get_file(path, str(to), callback=_capped(most))
        found = to.stat().st_size
        if size is not None and found != size:
            raise _WrongContent(f"received {found} bytes instead of {size}")
        if sha256 is not None and file_sha256(to) != sha256:
            raise _WrongContent("its SHA-256 differs from the manifest's")

    try:
        _persist(url, retry, transfer)
    except BaseException:
        to.unlink(missing_ok=True)
        raise


def fetch_resumable(
    url: str, to: Path, *, retry: Retry, progress: Callable[[int, int], None] = lambda done, size: None
) -> None:
    """Downloads the file to `to` in ranges, going on after the bytes of an earlier call that are there already.

    Those are kept after an error too, with `TO.from.json`, which says what they are of. If the file on the server has
    changed since, it starts again. Attempts are counted from the last one that received a range. `progress` is called
    with the bytes there are and the file's size, also before the first range.

    Raises:
        DataError: the file doesn't exist, may not be read, is sent without its size or not in ranges, or didn't arrive
            whole in `retry.attempts` attempts in a row that received nothing.
    """
    note = to.with_name(f"{to.name}.from.json")

    def transfer(filesystem: Any, path: str) -> None:
        info = filesystem.info(path)
        size, parts = info.get("size"), info.get("partial", True)
        if not isinstance(size, int) or not size or not parts:
            raise DataError(
                f"{shown(url)} is sent without its size, or not in ranges; download it yourself and give the file"
            )
        this = {"url": url, "size": size, "version": info.get("ETag") or info.get("Last-Modified")}
        if not note.exists() or json.loads(note.read_text(encoding="utf-8")) != this:
            to.unlink(missing_ok=True)
            note.write_text(json.dumps(this), encoding="utf-8")
        with to.open("ab") as file, filesystem.open(path, "rb", block_size=1, cache_type="none", size=size) as remote:
            while True:
                have = file.tell()
                progress(have, size)
                if have >= size:
                    return
                remote.seek(have)
                wanted = min(_RANGE, size - have)
                received = remote.read(wanted)
                if len(received) != wanted:
                    raise _WrongContent(f"received {len(received)} bytes instead of {wanted} at {have} of {size}")
                file.write(received)
                file.flush()

    _persist(url, retry, transfer, received=lambda: to.stat().st_size if to.exists() else 0)
    note.unlink()


def open_remote(url: str, retry: Retry) -> IO[bytes]:
    """Returns the file as a stream to be read once, from the beginning.

    Raises:
        DataError: it can't be opened.
    """
    opened = _persist(url, retry, lambda filesystem, path: filesystem.open(path, "rb", cache_type="readahead"))
    return cast(IO[bytes], opened)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, as hexadecimal digits."""
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
                raise _WrongContent(f"received over {most} bytes")

    return Cap()


def _persist(
    url: str, retry: Retry, work: Callable[[Any, str], Any], *, received: Callable[[], int] = lambda: 0
) -> Any:
    """Returns work(filesystem, path); retries it after transient errors.

    Attempts are counted anew whenever `received`, the bytes that an attempt has added to, has grown.
    """
    check_address(url)
    attempt, before = -1, received()
    while True:
        attempt += 1
        try:
            return work(*_filesystem(url, retry))
        except DataError:
            raise
        except Exception as raised:  # each filesystem raises its own errors; permanent ones are identified below
            error = raised.__cause__ or raised  # fsspec reports any failure to get a size as "not found"
            if isinstance(error, DataError):  # of `_checked_redirects`
                raise error from None
            reason = shown(" ".join(str(error).split())) or type(error).__name__
            if isinstance(error, ImportError):
                raise DataError(
                    f"{shown(url)} needs {PACKAGES[str(scheme_of(url))]} ({reason}); install it with pip"
                ) from None
            if _permanent(error):
                text = f"{shown(url)} can't be fetched ({reason}); check the address and the permissions"
                raise NotThereError(text) from None
            if (now := received()) > before:
                attempt, before = 0, now
            if attempt + 1 >= retry.attempts:
                kind = OtherContentError if isinstance(error, _WrongContent) else DataError
                raise kind(
                    f"{shown(url)} couldn't be fetched in {retry.attempts} attempts (last error: {reason}); "
                    "check the server and the connection"
                ) from None
            pause = min(retry.longest_pause_s, retry.first_pause_s * 2**attempt)
            # shorten the pause by up to half, keyed by the address, so that not all processes retry at once
            address = np.array([zlib.crc32(url.encode())])
            pause *= 0.5 + 0.5 * float(rng.uniform(0, "fetch", attempt, address, 1)[0, 0])
            logger.warning("%s: %s; trying again in %.1f s", shown(url), reason, pause)
            time.sleep(pause)


def _filesystem(url: str, retry: Retry) -> tuple[Any, str]:
    """Returns fsspec's filesystem for an address, and the path within it."""
    import fsspec

    options: dict[str, Any] = {}
    scheme = scheme_of(url)
    if scheme in ("https", "http", "gs"):
        import aiohttp

        waits = aiohttp.ClientTimeout(total=None, sock_connect=retry.timeout_s, sock_read=retry.timeout_s)
    if scheme == "gs":
        options = {"requests_timeout": waits}
    elif scheme in ("https", "http"):
        options = {"client_kwargs": {"timeout": waits, "trace_configs": [_checked_redirects(retry.redirect_hosts)]}}
        if _TRUSTED is not None:
            options["ssl"] = _TRUSTED
    elif scheme == "s3":
        options = {"config_kwargs": {"connect_timeout": retry.timeout_s, "read_timeout": retry.timeout_s}}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


@functools.lru_cache  # the same one each time, since fsspec keeps a filesystem for each set of options
def _checked_redirects(hosts: tuple[str, ...] | None) -> Any:
    """Returns what makes aiohttp refuse redirects from https to http, and to other servers than `hosts`, at each hop.

    aiohttp itself sends no credentials to another server.
    """
    import aiohttp
    import yarl

    async def check(session: Any, context: Any, step: Any) -> None:
        headers, origin = step.response.headers, step.url
        given = headers.get("Location") or headers.get("URI") or ""  # as aiohttp reads them
        try:
            target = origin.join(yarl.URL(given))
            server, port = target.host, target.port
        except ValueError:
            server = port = None
        there = f"{target.scheme}://{server}:{port}" if server else repr(given)
        loopback = origin.scheme == "http" and server in _LOOPBACK
        if server is None or target.scheme != "https" and not (loopback and target.scheme == "http"):
            raise DataError(
                f"{shown(origin)} redirects to {there}, which isn't https; check the address, or download the file "
                "yourself"
            )
        known = (server, port) == (origin.host, origin.port) or f"{server}:{port}" in (hosts or ())
        if not known and not (server in (hosts or ()) and port == 443):
            allow = f"data.redirect_hosts=[{server}{'' if port == 443 else f':{port}'}]"
            trust = "" if hosts is None else f" or, if you trust that server with shards, allow it: {allow}"
            raise DataError(f"{shown(origin)} redirects to another server, {there}; download the file yourself{trust}")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    return trace


def shown(text: Any) -> str:
    """Returns a text, its addresses without user, password, query and fragment, which may be secret."""
    return _SECRETS.sub(r"\1\2", str(text))


def _permanent(error: BaseException) -> bool:
    """Returns whether retrying can't help."""
    if isinstance(error, (FileNotFoundError, PermissionError, ssl.CertificateError)):
        return True
    response = getattr(error, "response", None)  # botocore's is a mapping
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _TRY_AGAIN

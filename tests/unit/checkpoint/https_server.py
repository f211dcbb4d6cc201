"""A local HTTPS server with its own certificate that serves ranges of one file, and misbehaves when it is told to."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.unit.local_servers import served


class Server:
    """Serves `content` under any name.

    Attributes:
        cuts: answers to be cut in the middle, from now on.
        claimed: the size that is stated instead of the true one.
        redirect: where every request is sent, but those for names in `reached`.
        status: of every answer instead of 200 and 206.
        ranges: first and last byte of the ranges that were asked for.
        sent: bytes of bodies.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.etag = content, "one"
        self.cuts, self.sent, self.status = 0, 0, 0
        self.claimed: int | None = None
        self.redirect: str | None = None
        self.html: bytes | None = None
        self.ignores_ranges = False
        self.ranges: list[tuple[int, int]] = []
        self.lock = threading.Lock()


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            if server.redirect is not None and not self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", server.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if server.status:
                return self.send_error(server.status)
            data = server.content if server.html is None else server.html
            size = len(data) if server.claimed is None else server.claimed
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and not server.ignores_ranges:
                first, last = int(asked[1]), int(asked[2])
                with server.lock:
                    server.ranges.append((first, last))
                if first >= len(data):
                    return self.send_error(416)
                data = data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
                self.send_header("Content-Length", str(len(data)))
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(size))
            if server.ignores_ranges:
                self.send_header("Accept-Ranges", "none")
            self.send_header("ETag", server.etag)
            self.end_headers()
            if not body:
                return None
            with server.lock:
                cut = server.cuts > 0
                server.cuts -= cut
                server.sent += len(data)
            if cut:
                self.close_connection = True
                data = data[: len(data) // 2]
            with contextlib.suppress(OSError):
                self.wfile.write(data)
            return None

    return Handler


def certificate(folder: Path) -> Path:
    """Makes a key and a certificate for 127.0.0.1 in one file, valid for a day."""
    path = folder / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=127.0.0.1"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@contextlib.contextmanager
def serving(server: Server, pem: Path) -> Iterator[str]:
    """Yields the address of the running server."""
    with served(_handler(server), pem) as address:
        yield f"{address}/"

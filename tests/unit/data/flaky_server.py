"""A local HTTP server that fails on purpose: it drops connections, truncates, answers 503, stalls or sends garbage."""

from __future__ import annotations

import collections
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.unit.local_servers import served

FAULTS = ("503", "drop", "cut", "garbage", "stall")


class FlakyServer:
    """Serves a folder; each answer is a fault with the given probability. Counts answers by path."""

    def __init__(self, folder: Path, faults: tuple[str, ...] = (), probability: float = 0.0, seed: int = 0) -> None:
        self.folder, self.faults, self.probability = folder, faults, probability
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.sent: collections.Counter[str] = collections.Counter()  # complete answers to GET, by path
        self.failed: collections.Counter[str] = collections.Counter()  # by fault
        self.seconds_per_answer = 0.0

    def fault(self) -> str | None:
        """Returns the fault of the next answer; None for a complete one."""
        with self.lock:
            chosen = self.random.choice(self.faults) if self.random.random() < self.probability else None
            if chosen:
                self.failed[chosen] += 1
            return chosen


def _handler(server: FlakyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = server.folder / self.path.lstrip("/")
            if self.path.startswith("/secret"):
                return self.send_error(403)
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            fault = server.fault()
            if fault == "503":
                return self.send_error(503)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return None
            time.sleep(server.seconds_per_answer)
            if fault == "garbage":
                data = bytes(len(data))
            elif fault is not None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        time.sleep(1.0)
                    if fault == "drop":
                        self.connection.close()
                return None
            with contextlib.suppress(OSError):
                self.wfile.write(data)
            if fault is None:
                with server.lock:
                    server.sent[self.path] += 1
            return None

    return Handler


@contextlib.contextmanager
def serving(server: FlakyServer) -> Iterator[str]:
    """Yields the address of the running server."""
    with served(_handler(server)) as address:
        yield address

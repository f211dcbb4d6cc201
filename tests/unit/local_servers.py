"""An HTTP server of this host for one test, over TLS if it is given a certificate."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextlib.contextmanager
def served(handler: type[BaseHTTPRequestHandler], pem: Path | None = None) -> Iterator[str]:
    """Yields the address of a running server that answers with this handler; `pem` holds key and certificate."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    if pem is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"{'http' if pem is None else 'https'}://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()

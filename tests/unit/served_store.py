"""A process that serves a store, for tests that stop it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_SERVE = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(120)
"""


@contextlib.contextmanager
def served_store() -> Iterator[tuple[subprocess.Popen, int]]:
    """Yields the process and its port; what still waits for it ends with the block."""
    with subprocess.Popen([sys.executable, "-c", _SERVE], stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            yield serving, int(serving.stdout.readline())
        finally:
            serving.kill()

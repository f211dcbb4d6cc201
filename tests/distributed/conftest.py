"""What tests that start runs share: no run outlives its test, whatever became of that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest

from tests.distributed.commands import STARTED


@pytest.fixture(autouse=True)
def no_run_is_left() -> Iterator[None]:
    """Ends the runs that a test has started and not waited for, stopped processes of theirs included."""
    yield
    for run in STARTED:
        if run.poll() is None:
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            run.wait()
    STARTED.clear()

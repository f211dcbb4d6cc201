"""Progress on a real pseudo-terminal: log lines stay whole, and a terminal without a size gets lines."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from ijepa_scale import terminal
from ijepa_scale.metrics.progress import Progress

ROW = {"step": 3, "loss": 0.25, "step_ms": 2.0}


@contextmanager
def a_terminal(rows: int, columns: int) -> Iterator[tuple[TextIO, list[bytes]]]:
    """Yields a terminal's stream, and what was written to it once the context has ended."""
    inner, outer = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    found: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(inner, 4096):
                found.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(outer, "w", closefd=True) as stream:
            yield stream, found
    finally:
        reader.join(10)
        os.close(inner)


def lines_on(found: list[bytes]) -> list[str]:
    """Returns the lines as a terminal shows them: what a carriage return goes back over is written over."""
    shown = []
    for line in b"".join(found).decode().replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return shown


@contextmanager
def printed_to(stream: TextIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prints, and logs as the scripts do, to a stream."""
    root = logging.getLogger()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(root, "handlers", [])
    before = root.level
    terminal.log_to_terminal()
    try:
        yield
    finally:
        root.setLevel(before)


def test_log_lines_stay_whole_next_to_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_terminal(24, 80) as (stream, found), printed_to(stream, monkeypatch):
        with pytest.raises(RuntimeError), Progress(9, stream=stream) as progress:
            for step in range(5):
                progress.advance()
                logging.getLogger("x").warning("warning %d", step)
            progress.show(ROW)
            progress.note("step 5  top-1 50%")
            raise RuntimeError("the run ends")
        logging.getLogger("x").warning("after the bar")
        terminal.report("no space is left")
    lines = lines_on(found)
    assert "5/9" in "".join(lines), "no bar was shown"
    expected = [
        *(f"warning {step}" for step in range(5)),
        "step 5  top-1 50%",
        "after the bar",
        "error: no space is left",
    ]
    assert [line for line in lines if line in expected] == expected, lines


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 0), (0, 80)])
def test_a_terminal_without_a_size_gets_lines(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_terminal(rows, columns) as (stream, found), printed_to(stream, monkeypatch):
        with Progress(9, stream=stream) as progress:
            progress.advance()
            progress.show(ROW)
            logging.getLogger("x").warning("a warning")
    assert lines_on(found) == ["step 3/9  loss 0.2500  eta 00:00:00", "a warning", ""]

"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TextIO

from tqdm import tqdm

from ijepa_scale.metrics.own_time import slow_process

logger = logging.getLogger(__name__)


def _log(text: str) -> None:
    logger.info("%s", text, extra={"printed": True})


def describe(row: Mapping[str, Any]) -> str:
    """Returns one line with a row's loss, learning rate, speed and share of time spent waiting for data.

    A process that holds the others up is named.
    """
    parts = []
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    if row.get("lr") is not None:
        parts.append(f"lr {row['lr']:.1e}")
    if row.get("images_per_s") is not None:
        parts.append(f"{row['images_per_s']:.0f} img/s")
    if row.get("data_wait_ms") is not None and row.get("step_ms"):
        parts.append(f"wait {row['data_wait_ms'] / row['step_ms']:.0%}")
    if (slow := slow_process(row)) is not None:
        parts.append(slow)
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as 00:03:12, with the days first if there are any."""
    whole = timedelta(seconds=round(seconds))
    hours, rest = divmod(whole.seconds, 3600)
    clock = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{whole.days}d {clock}" if whole.days else clock


class _AboveBars:
    """A stream that writes each text above the bars of the terminal, of which it is another way in."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text of whole lines."""
        with tqdm.external_write_mode(file=self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        """Writes what waits."""
        self._stream.flush()


@contextlib.contextmanager
def _logging_above_bars() -> Iterator[None]:
    """Lets what is logged to the terminal appear above the bars, and not at the end of their lines.

    `tqdm.contrib.logging` makes handlers without the filters of those that it replaces, so lines would appear twice.
    """
    console = (sys.stdout, sys.stderr)
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in console
    ]
    streams = [handler.setStream(_AboveBars(handler.stream)) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


def _has_room(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal of at least one row and column: a bar on another can't be seen."""
    try:
        return stream.isatty() and 0 not in os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # no terminal after all, or none that is a file
        return False


class Progress:
    """Shows the progress of a run. A context: at its end, the bar ends.

    `mode` is auto (a bar if `stream` is a terminal that has a size, else lines), bar, lines or none. Call `advance` at
    each step and `show` with each row. The remaining time is estimated from the row's step time.
    """

    def __init__(self, total_steps: int, *, mode: str = "auto", first_step: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._total = total_steps
        if mode == "auto":
            mode = "bar" if _has_room(self._stream) else "lines"
        self._mode = mode
        self._bar = None
        self._ends = contextlib.ExitStack()
        if mode == "bar":
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", file=self._stream, dynamic_ncols=True, leave=True
            )
            self._ends.callback(self._bar.close)
            self._ends.enter_context(_logging_above_bars())

    def advance(self) -> None:
        """Counts one step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, row: Mapping[str, Any]) -> None:
        """Shows a row whose `step` counts the steps done."""
        if self._mode == "none":
            return
        done = row["step"]
        line = f"step {done:>{len(str(self._total))}}/{self._total}  {describe(row)}"
        if row.get("step_ms") is not None:
            line += f"  eta {duration((self._total - done) * row['step_ms'] / 1e3)}"
        if self._bar is None:
            self.note(line)
        else:
            self._bar.set_postfix_str(describe(row), refresh=False)
            _log(line)

    def note(self, text: str) -> None:
        """Shows a line of text, above the bar if there is one, and logs it for files."""
        if self._mode != "none":
            _log(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._mode != "none":
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

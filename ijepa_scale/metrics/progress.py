"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
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


class Progress:
    """Shows the progress of a run.

    `mode` is auto (a bar if `stream` is a terminal, else lines), bar, lines or none. Call `advance` at each step and
    `show` with each row. The remaining time is estimated from the row's step time.
    """

    def __init__(self, total_steps: int, *, mode: str = "auto", first_step: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._total = total_steps
        if mode == "auto":
            mode = "bar" if self._stream.isatty() else "lines"
        self._mode = mode
        self._bar = None
        if mode == "bar":
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", file=self._stream, dynamic_ncols=True, leave=True
            )

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

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

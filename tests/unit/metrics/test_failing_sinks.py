"""A disk that takes no rows for a while loses none of them in metrics.jsonl, and never ends a run."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.metrics.sinks import JsonlSink, Sinks, TensorBoardSink
from ijepa_scale.metrics.stored_rows import read_rows


class Flaky:
    """A file that takes only some bytes of some writes."""

    def __init__(self, file: Any, takes: list[int | None]) -> None:
        self._file, self._takes = file, takes

    def write(self, line: bytes) -> int:
        most = self._takes.pop(0) if self._takes else None
        if most == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(line if most is None else line[:most])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@given(takes=st.lists(st.none() | st.integers(0, 12), max_size=12), rows=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_rows_wait_for_the_disk(takes: list[int | None], rows: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    sink = JsonlSink(path)
    sink._file = Flaky(sink._file, [*takes])  # type: ignore[assignment]
    sinks = Sinks([sink])
    for step in range(1, rows + 1):
        sinks.write({"step": step, "loss": 0.5})
        assert [row["step"] for row in read_rows(path)] == list(range(1, 1 + len(read_rows(path)))), "in order, whole"
    sink._file._takes.clear()  # type: ignore[attr-defined]
    sinks.close()
    assert [row["step"] for row in read_rows(path)] == list(range(1, rows + 1))


def test_an_episode_is_said_once_and_its_end_too(tmp_path: Path, caplog) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink._file = Flaky(sink._file, [None, 0, 0, None])  # type: ignore[assignment]
    sinks = Sinks([sink])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            sinks.write({"step": step})
        sinks.close()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("ERROR", "metrics.jsonl: step 2 isn't written ([Errno 28] No space left on device); training goes on"),
        ("WARNING", "metrics.jsonl is written again from step 4 on"),
    ]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5


def test_a_disk_that_stays_full_ends_with_an_error_and_no_exception(tmp_path: Path, caplog) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink._file.close()
    sink._file = Path("/dev/full").open("ab", buffering=0)
    sinks = Sinks([sink])
    sinks.write({"step": 1})
    sinks.close()
    assert "the last rows aren't written" in caplog.text


def test_tensorboard_begins_a_new_file(tmp_path: Path, caplog) -> None:
    sink = TensorBoardSink(tmp_path)
    sinks = Sinks([sink])
    sinks.write({"step": 1, "loss": 1.0})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink._writer.add_scalar = full  # type: ignore[union-attr, method-assign]
    sinks.write({"step": 2, "loss": 2.0})
    sinks.write({"step": 3, "loss": 3.0})
    sinks.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]
    assert "TensorBoard: step 2 isn't written" in caplog.text

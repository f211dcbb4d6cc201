"""Each process of a run has a log, and all of them can be read as one."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale import terminal
from ijepa_scale.errors import ConfigError, UserError
from ijepa_scale.metrics.progress import Progress
from ijepa_scale.stopping import Stopped
from ijepa_scale.train.process_log import log_path, merged, process_log

logger = logging.getLogger("ijepa_scale.somewhere")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a run folder with something in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


@contextlib.contextmanager
def new_terminal(level: int, form: str = "%(message)s") -> Iterator[None]:
    """Logs to the terminal as a new process does, without pytest's handlers."""
    root = logging.getLogger()
    handlers, before = root.handlers, root.level
    root.handlers = []
    terminal.log_to_terminal(level, form)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(before)


def lines(folder: Path, rank: int = 0) -> list[str]:
    """Returns the lines of a log without times."""
    text = log_path(folder, rank).read_text()
    return [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", "", line) for line in text.splitlines()]


def test_a_log_has_what_the_terminal_has_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of other processes than the first, the terminal shows warnings only."""
    with new_terminal(logging.WARNING), process_log(folder, 3, 16):
        logger.info("read %s", "a\nb")
        logger.warning("beware")
        logger.debug("not this")
        logging.getLogger("other").info("nor this")
    logger.info("nor that")
    first, *middle, last = lines(folder, 3)
    assert re.fullmatch(r"\[3\] INFO ijepa_scale.run: process 3 of 16 begins: process \d+ on \S+(, job \d+)?", first)
    assert middle == [r"[3] INFO ijepa_scale.somewhere: read a\nb", "[3] WARNING ijepa_scale.somewhere: beware"]
    assert last == "[3] INFO ijepa_scale.run: ends: done"
    assert capsys.readouterr().err == "beware\n"


def test_a_run_that_goes_on_appends_each_line_once(folder: Path) -> None:
    for start in range(3):
        with process_log(folder, 0, 1):
            logger.info("start %d", start)
    assert [line.rpartition(": ")[2] for line in lines(folder)[1::3]] == ["start 0", "start 1", "start 2"]
    assert len(lines(folder)) == 9


@pytest.mark.parametrize("mode", ["lines", "bar", "none"])
def test_progress_is_in_the_log_and_once_on_the_terminal(
    mode: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_terminal(logging.INFO), process_log(folder, 0, 1):
        with Progress(20, mode=mode) as progress:
            progress.show({"step": 5, "loss": 0.5})
            progress.note("step 5  top-1 50%")
    found = [line for line in lines(folder) if "metrics.progress" in line]
    wanted = ["step  5/20  loss 0.5000", "step 5  top-1 50%"]
    assert [line.partition("progress: ")[2] for line in found] == ([] if mode == "none" else wanted)
    said = capsys.readouterr()
    assert said.out.count("top-1") == (mode != "none") and "top-1" not in said.err


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (Stopped("SIGTERM; saved x"), ["[0] INFO ijepa_scale.run: ends: SIGTERM; saved x"]),
        (ConfigError("a is 1; no", "b\nc"), ["[0] ERROR ijepa_scale.run: ends: a is 1; no", "b", "c"]),
        (
            RuntimeError("lost"),
            ["[0] ERROR ijepa_scale.run: ends: RuntimeError: lost", "Traceback (most recent call last):"],
        ),
    ],
)
def test_the_end_is_told(error: Exception, wanted: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)), process_log(folder, 0, 1):
        raise error
    assert lines(folder)[1 : 1 + len(wanted)] == wanted
    assert not capsys.readouterr().err, "it is told elsewhere"


def test_a_run_that_fails_before_it_writes_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError), process_log(tmp_path, 0, 1):
        logger.info("looking")
        raise UserError("no data")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with process_log(tmp_path, 0, 1):
        logger.info("looking")
        (tmp_path / "config.yaml").touch()
        logger.info("found")
    assert [line.rpartition(": ")[2] for line in lines(tmp_path)[1:]] == ["looking", "found", "done"]


@pytest.mark.parametrize("kind", ["no folder", "full disk"])
def test_a_log_that_cannot_be_written_is_told_once(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "no folder":
        (folder / "logs").touch()
    else:
        (folder / "logs").mkdir()
        log_path(folder, 0).symlink_to("/dev/full")
    with process_log(folder, 0, 1):
        for _ in range(5):
            logger.info("lost")
    said = capsys.readouterr().err
    assert (
        said.count("process-00000.log can't be written") == 1 and "free space" in said and len(said.splitlines()) == 1
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_logs_are_merged_by_time(tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, int]]) -> None:
    """With the lines that belong to a record."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "logs").mkdir()
    (folder / "logs" / "slurm-7.out").write_text("not a process's\n")
    wanted = []
    for number, (rank, more) in enumerate(records):
        entry = [f"2026-11-26T14:00:{number:02d}.000Z [{rank}] INFO a: b", *(f"  line {i}" for i in range(more))]
        wanted += entry
        with log_path(folder, rank).open("a") as file:
            file.write("".join(line + "\n" for line in entry))
    if records:
        assert list(merged(folder)) == wanted
    else:
        with pytest.raises(UserError, match="has no logs/process"):
            list(merged(folder))

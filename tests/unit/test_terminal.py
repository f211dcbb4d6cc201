"""What the launch scripts share: one line for each mistake, in any encoding, and quiet ends."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale import terminal
from ijepa_scale.environment import child_environment
from ijepa_scale.errors import ConfigError, DataError, ReplicaError, SaveError
from ijepa_scale.escapes import bounded, one_line
from ijepa_scale.metrics.sinks import TensorBoardSink
from launch import demo, export, plan, predict, tune
from tests.unit.data.shards.image_sets import class_folders

ROOT = Path(__file__).parents[2]
TEXTS = st.text(st.characters(exclude_categories=())) | st.text("a\\ \n\r\t\x1b\x85\u2028\u202e\udce9é")


@given(TEXTS)
def test_any_text_is_one_line_of_valid_utf8(text: str) -> None:
    shown = one_line(text)
    assert shown.splitlines() in ([], [shown]) and shown.encode() is not None
    assert one_line(shown) == shown and not set(shown) & set("\n\r\t\x1b\u202e")
    assert shown == text or not text.isascii() or not text.isprintable()


@given(st.text("ab ", max_size=3000))
def test_a_long_message_keeps_its_ends(text: str) -> None:
    shown = bounded(text)
    assert len(shown) <= 1200 and shown[:600] == text[:600] and shown[-300:] == text[-300:]
    assert shown == text or f"...({len(text) - 1000} characters)..." in shown


def test_errors_are_told_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.report(DataError("file a\nb\x1b[2J can't be read"))
    terminal.report(ConfigError("seed is 'x'; give a number", "folder is 'a\tb'; no"), "error (process 3)")
    terminal.report(ConfigError(f"seed is '{'9' * 100_000}'; give a whole number"))
    first, *config, long = capsys.readouterr().err.splitlines()
    assert first == r"error: file a\nb\u001b[2J can't be read"
    assert config == ["error (process 3): seed is 'x'; give a number", r"folder is 'a\tb'; no"]
    assert len(long) < 1300 and long.startswith("error: seed is '999") and long.endswith("9'; give a whole number")


def test_log_records_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    logger = logging.Logger("x", logging.INFO)
    monkeypatch.setattr(logging, "basicConfig", lambda level, handlers: logger.addHandler(handlers[0]))
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.log_to_terminal(form="[0] %(message)s")
    logger.info("%s and %r: %d of %.1f %%", Path("a\nb"), "c\nd", 3, 2.5)
    logger.info("%s", "a report\nof two lines")
    logger.info("100 %\x1b")
    try:
        raise ValueError("e\nf")
    except ValueError as error:
        logger.info("failed (%s)", error)
    lines = stream.getvalue().splitlines()
    assert lines == [
        r"[0] a\nb and 'c\nd': 3 of 2.5 %", "[0] a report", "of two lines", r"[0] 100 %\u001b", r"[0] failed (e\nf)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (terminal.at_least_1, {"1": 1, " 7": 7}, ["0", "-1", "1.5", "x", ""]),
        (terminal.at_least_0, {"0": 0, " 7": 7}, ["-1", "1.5", "x", ""]),
        (terminal.above_0, {"1e-3": 1e-3, "2": 2.0}, ["0", "-1", "nan", "inf", "x"]),
        (terminal.path, {"a/$1": "a/$1", "$$A": "$A"}, ["", " ", "$NOT_SET_HERE", "~nobody-here", "{{ x }}"]),
    ],
)
def test_the_types_of_flags(kind, good: dict, bad: list) -> None:  # noqa: ANN001
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="^is '.*'; "):
            kind(text)


def test_names_that_a_shell_filled_in_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("~", "a$b.jpg", "$HOME"):
        assert name == "a$b.jpg" or terminal.existing_path(name) == "/home/me"
        Path(name).touch()
        assert terminal.existing_path(name) == name


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (predict.main, ["a.jpg", "--model", ""], "--model is ''; give a path"),
        (predict.main, ["a.jpg", "--model", "m", "--top", "0"], "--top is '0'; give a whole number of at least 1"),
        (predict.main, ["", "--model", "m"], "images is ''; give a path"),
        (export.main, ["run", "--to", ""], "--to is ''; give a path"),
        (export.main, ["$NOT_SET_HERE", "--to", "a"], "source is '$NOT_SET_HERE'; the variable NOT_SET_HERE isn't set"),
        (export.main, ["run", "--to", "a", "--processes", "0"], "--processes is '0'; give a whole number of at least"),
        (plan.main, ["--config", "", "--gpus", "h100"], "--config/--fname is ''; give a path"),
        (plan.main, ["--gpus", "h100"], "the following arguments are required: --config/--fname"),
        (plan.main, ["--plugin", "no.such", "--config", "a", "--gpus", "h100"], "--plugin no.such: no such module"),
        (tune.main, ["--config", "a", "--to", ""], "--to is ''; give a path"),
        (tune.main, ["--config", "a", "--logs", " "], "--logs is ' '; give a path"),
        (demo.main, ["--folder", ""], "--folder is ''; give a path"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(main, arguments, said, capsys) -> None:  # noqa: ANN001
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1, error


def started(tmp_path: Path, script: str, *arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / f"{script}.py"), *map(os.fsencode, map(str, arguments))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=child_environment(**variables),
    )  # fmt: skip


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "utf-8:strict"}, {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}]
)
def test_any_name_is_printed_in_any_encoding(tmp_path: Path, variables: dict[str, str]) -> None:
    root = class_folders(tmp_path / "set", 6)
    os.rename(root / "a", root / "caf\udce9")
    os.rename(root / "b", root / "dél\n")
    to = "s\udce9"
    for arguments in (("make", "--root", root, "--to", to, "--workers", 0), ("info", to)):
        process = started(tmp_path, "shards", *arguments, **variables)
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and b"Traceback" not in error, error.decode()
    assert "3 names, c, caf\\xe9, d" in out.decode() and "l\\n\n" in out.decode()


@pytest.mark.parametrize("script", ["shards", "pretrain"])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, script: str) -> None:
    class_folders(tmp_path / "set", 3)
    arguments = ["--help-config"] if script == "pretrain" else ["make", "--root", "set", "--to", "to", "--workers", "0"]
    process = started(tmp_path, script, *arguments)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=120) == 141 and not error, error


def test_tensorboard_refuses_a_name_that_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whose name isn't UTF-8; set another folder, or logging.tensorboard=false"):
        TensorBoardSink(tmp_path / "r\udce9")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2), (SaveError("x"), 74), (ReplicaError("x"), 70), (OSError(errno.ENOSPC, "x", "y"), 2),
        (OSError(errno.ECONNRESET, "x"), 1), (KeyError("x"), 1),
    ],
)  # fmt: skip
def test_each_error_has_its_code(error: Exception, code: int) -> None:
    assert terminal.code_of(error) == code

"""A broken line of metrics.jsonl is set aside by the run that goes on, and left out by readers; both warn of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.errors import DataError
from ijepa_scale.metrics.sinks import JsonlSink
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.visualize.curves import read_runs

DAMAGE = st.one_of(
    st.sampled_from([b"not json", b"[1]", b'{"loss": 1}', b'{"step": "\xff"}', b'{"step": 1, "x": "\xff"}', b"\0" * 9]),
    st.sampled_from(
        ["NaN", "Infinity", "-Infinity", "1e999", "true", "null", '"1"', "[]", "1" + "0" * 400, "[" * 9999]
    ).map(lambda step: f'{{"step": {step}}}'.encode()),
    st.sampled_from([b'{"step": 3, "loss": NaN}', b'{"step": 3, "step": 4}', b"", b"\xff\xfe{", b"{\x1b[2J}"]),
    st.integers(1, 20).map(lambda cut: b'{"step": 3, "loss": 1.25}'[:cut]),
    st.binary(max_size=30).map(lambda noise: b"\xff" + noise.replace(b"\n", b"")),
)
ROWS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]


def written(lines: list[bytes], *, ends: bool) -> bytes:
    return b"\n".join(lines) + (b"\n" if ends else b"")


@given(damage=st.dictionaries(st.integers(0, 4), DAMAGE, min_size=1), ends=st.booleans())
@settings(max_examples=80, deadline=None)
def test_broken_lines_are_set_aside(
    tmp_path_factory: pytest.TempPathFactory, damage: dict[int, bytes], ends: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    lines: list[bytes] = []
    broken: list[bytes] = []
    for number, row in enumerate([*ROWS, None]):
        if number in damage:
            lines.append(damage[number])
            broken.append(damage[number])
        if row is not None:
            lines.append(json.dumps(row).encode())
    if not ends and not lines[-1]:
        broken.pop()  # nothing is no line
    path.write_bytes(written(lines, ends=ends))
    before = path.read_bytes()
    assert read_rows(path) == ROWS
    assert path.read_bytes() == before and os.listdir(path.parent) == ["metrics.jsonl"], "a reader changes nothing"
    sink = JsonlSink(path, drop_from=4)
    sink.write({"step": 4, "loss": 0.25})
    sink.close()
    assert read_rows(path) == ROWS
    aside = path.with_name("metrics.broken.jsonl")
    assert (aside.read_bytes() if broken else b"") == b"".join(line + b"\n" for line in broken)


def test_they_are_told_by_number_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xff"}\n{"step": NaN}\n[]\n{"step": 5}\n{"st')
    said = (
        f'{path}: line 2 is broken (no UTF-8: \'{{"step": 2, "x": "\ufffd"}}\\n\'); '
        "line 3 is broken (no JSON: '{\"step\": NaN}\\n'); "
        "line 4 is broken (no JSON object with a step: '[]\\n'); line 6 is broken (cut off: '{\"st')"
    )
    with caplog.at_level(logging.WARNING):
        (run,) = read_runs([str(path)])
        JsonlSink(path).close()
        JsonlSink(path).close()
    assert [row["step"] for row in run.rows] == [1, 5]
    assert [record.getMessage() for record in caplog.records] == [
        f"{said}: left out", f"{said}: moved to metrics.broken.jsonl"
    ]  # fmt: skip
    path.write_bytes(b"x\n" * 9)
    caplog.clear()
    assert read_rows(path) == [] and "line 5 is broken" in caplog.text and "and 4 more" in caplog.text


LONG = """
import resource, sys, pathlib
from ijepa_scale.metrics.sinks import JsonlSink
from ijepa_scale.metrics.stored_rows import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = pathlib.Path(sys.argv[1])
assert [row["step"] for row in read_rows(path)] == [1, 2]
JsonlSink(path).close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_line_of_100_mb_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n{"step": 1.5, "x": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}\n{"step": 2}\n')
    ran = subprocess.run(
        [sys.executable, "-c", LONG, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert int(ran.stdout) < 20_000, "KiB"
    assert "line 2 is broken (100000023 bytes long)" in ran.stderr
    assert (tmp_path / "metrics.broken.jsonl").stat().st_size == 100_000_023
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    {"folder": os.mkdir, "pipe": os.mkfifo, "loop": lambda name: os.symlink(name, name)}[kind](path)
    with pytest.raises(DataError, match=f"{path} can't be read .*; fix its permissions, or move it"):
        read_rows(path)
    with pytest.raises(OSError):
        JsonlSink(path)

"""A run that is killed at a random step resumes as if it had never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.commands import (
    ZERO3,
    final_hashes,
    finish,
    losses,
    rows,
    start,
    write_config,
    write_data,
    write_photos,
)

CASES = {
    "plain": (),
    "zero3 x2": ("--processes", "2", *ZERO3),
    "photos": ("data.reader=imagefolder", "data.train={imagefolder}"),
    "list": ("data.reader=list", "data.train={list}"),
}


@pytest.mark.parametrize(
    "case",
    ["plain", *(pytest.param(case, marks=pytest.mark.long) for case in ("photos", "list", "zero3 x2"))],
)
def test_resume_after_kill_equals_an_uninterrupted_run(case: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    photos = write_photos(data, tmp_path)
    options = [option.format(**photos) for option in CASES[case]]
    whole = write_config(tmp_path / "whole.yaml", data, tmp_path / "whole")
    broken = write_config(tmp_path / "broken.yaml", data, tmp_path / "broken")
    finish(start(whole, *options), whole)
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, 21))

    kill_after = random.SystemRandom().randint(4, 17)
    process = start(broken, *options)
    deadline = time.monotonic() + 200
    while len(losses(tmp_path / "broken")) < kill_after:
        assert process.poll() is None and time.monotonic() < deadline, broken.with_suffix(".log").read_text()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(tmp_path / "broken")) < 20, "the run ended before it was killed"

    log = finish(start(broken, *options), broken)
    assert "resumed from" in log
    assert losses(tmp_path / "broken") == expected, f"killed after {kill_after} steps"
    assert final_hashes(tmp_path / "broken") == final_hashes(tmp_path / "whole")
    knn = [(row["step"], row["knn"], row["knn_untrained"]) for row in rows(tmp_path / "broken") if "knn" in row]
    assert knn == [(row["step"], row["knn"], row["knn_untrained"]) for row in rows(tmp_path / "whole") if "knn" in row]
    assert [step for step, *_ in knn] == [0, 10, 20]
    health = [[row for row in rows(tmp_path / name) if "rank_me" in row] for name in ("whole", "broken")]
    assert health[0] == health[1] and [row["step"] for row in health[0]] == [0, 4, 8, 12, 16, 20]

"""A row that is open when a run stops is the mean over all its steps, also over those before the stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.metrics.meters import Meters
from ijepa_scale.train.pretrain import PretrainTask, pretrain
from tests.unit.train.test_saver import configured, rows, state
from tests.unit.train.test_start import ALONE, data

__all__ = ["data"]


@pytest.mark.parametrize(("logging", "checkpoint", "killed"), [(4, 3, 5), (5, 2, 3), (6, 1, 5), (2, 3, 4)])
def test_a_killed_run_writes_the_rows_of_one_that_was_not(
    logging: int, checkpoint: int, killed: int, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"logging__every": logging, "checkpoint__every": checkpoint, "checkpoint__asynchronous": "false"}
    pretrain(configured(tmp_path, data, "whole", **every), ALONE)
    take = PretrainTask.step

    def step(task: PretrainTask, batch: Any) -> Any:
        if batch.step == killed:
            raise RuntimeError("killed")
        return take(task, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTask, "step", step)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(configured(tmp_path, data, "broken", **every), ALONE)
    pretrain(configured(tmp_path, data, "broken", **every), ALONE)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert state(tmp_path / "broken") == state(tmp_path / "whole")


STEPS = st.lists(
    st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()),  # a value, and whether the step was stopped
    min_size=2,
    max_size=8,
)


def count(meters: Meters, steps: list[tuple[float, bool]]) -> None:
    for value, stopped in steps:
        meters.count_step(torch.tensor(int(stopped)), loss=torch.tensor(value))
        meters.add("plain", 3 * value, count=2)


@given(by_process=st.lists(STEPS, min_size=1, max_size=3), cut=st.integers(0, 8))
def test_meters_go_on_to_the_last_bit(by_process: list[list[tuple[float, bool]]], cut: int) -> None:
    length = min(map(len, by_process))
    before = [Meters("cpu") for _ in by_process]
    for meters, steps in zip(before, by_process, strict=True):
        count(meters, steps[:cut][:length])
    vectors: list[torch.Tensor] = []
    for meters in before:
        meters.state(lambda own: vectors.append(own) or own[None])  # type: ignore[func-returns-value]
    saved = before[0].state(lambda _: torch.stack(vectors))
    for rank, steps in enumerate(by_process):
        whole, resumed = Meters("cpu"), Meters("cpu")
        resumed.load_state(saved, rank, len(by_process))
        count(whole, steps[:length])
        count(resumed, steps[cut:length])
        expected, found = whole.flush(), resumed.flush()
        assert str(found["plain"]) == str(expected["plain"])
        assert str(found["loss"]) == str(expected["loss"])  # nan where no step was taken


def test_another_number_of_processes_goes_on_with_the_mean() -> None:
    meters = Meters("cpu")
    meters.load_state({"loss": [[6.0, 2.0, 1.0], [2.0, 2.0, 1.0]]}, rank=0, size=3)
    meters.count_step(torch.tensor(0), loss=torch.tensor(5.0))
    assert meters.flush()["loss"] == 3.0

"""A run on a real disk that fills up: training goes on, ends with 74 if no save succeeds, and loses no bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.checkpoint import store
from ijepa_scale.train.pretrain import PretrainTask, pretrain
from ijepa_scale.train.processes import user_errors
from tests.unit.small_disks import fill, small_disk
from tests.unit.train.test_saver import configured, rows, state
from tests.unit.train.test_start import ALONE, data

__all__ = ["data"]


def filling(monkeypatch: pytest.MonkeyPatch, disk: Path, *, full_from: int, free_from: int | None = None) -> None:
    """Fills the disk before the step with that number, from 0, and frees it before the other."""
    take = PretrainTask.step

    def step(task: PretrainTask, batch: Any) -> Any:
        if batch.step == full_from:
            fill(disk)
        elif batch.step == free_from:
            (disk / "fill").unlink()
        return take(task, batch)

    monkeypatch.setattr(PretrainTask, "step", step)


def test_a_disk_that_is_full_for_a_while_costs_no_step(tmp_path: Path, data: Path, monkeypatch, caplog) -> None:
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    with small_disk(tmp_path / "disk", kib=4096) as disk:
        filling(monkeypatch, disk, full_from=2, free_from=4)
        pretrain(configured(tmp_path, data, "disk/run").replace(folder=str(disk / "run")), ALONE)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert any("training goes on until the next save (failure 1 in a row" in text for text in told), told
        assert state(disk / "run") == state(tmp_path / "whole")
        assert rows(disk / "run") == rows(tmp_path / "whole")


def test_a_disk_that_stays_full_ends_the_run_with_74_and_it_goes_on_later(
    tmp_path: Path, data: Path, monkeypatch, capsys
) -> None:
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    with small_disk(tmp_path / "disk", kib=4096) as disk:
        # the disk fills while the next step is taken, so the save before must be there by then
        waiting = {"checkpoint__max_failures": 2, "checkpoint__asynchronous": "false"}
        config = configured(tmp_path, data, "disk/run", **waiting).replace(folder=str(disk / "run"))
        with monkeypatch.context() as patch:
            filling(patch, disk, full_from=2)
            with pytest.raises(SystemExit) as ended, user_errors(0):
                pretrain(config, ALONE)
        assert ended.value.code == 74
        said = capsys.readouterr().err
        assert "error (process 0): " in said and "free space or fix the permissions" in said and "Traceback" not in said
        newest = store.newest(disk / "run" / "checkpoints")
        assert newest is not None and newest.name == "step-00000002"
        assert not list((disk / "run" / "checkpoints").glob(".unfinished*/*")), "what can't be completed takes no room"
        with pytest.raises(SystemExit) as ended, user_errors(0):
            pretrain(config, ALONE)
        assert ended.value.code == 2, "it is full at the start"
        said = capsys.readouterr().err
        assert said.count("error") == 1 and str(disk / "run") in said and "No space left on device" in said
        (disk / "fill").unlink()
        pretrain(config, ALONE)
        assert state(disk / "run") == state(tmp_path / "whole")
        assert rows(disk / "run") == rows(tmp_path / "whole")

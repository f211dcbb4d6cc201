"""A failing disk or evaluation costs no trained step, and the run that goes on equals one that never failed."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale import stopping
from ijepa_scale.checkpoint import store, writing
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.errors import NonFiniteError, SaveError
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.train.pretrain import PretrainTask, pretrain
from tests.unit.train.test_start import ALONE, CONFIG, MODEL, data

__all__ = ["data"]


def configured(tmp_path: Path, data: Path, name: str, **changes: Any) -> PretrainConfig:
    path = tmp_path / f"{name}.yaml"
    path.write_text(
        CONFIG.format(folder=tmp_path / name, model=MODEL, data=data)
        + "checkpoint: {every: 2}\nhealth: {keep_best: none}\n"
    )
    return load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows without what the clock says."""
    timed = ("data_wait_ms", "step_ms", "images_per_s", "mfu")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(folder / "metrics.jsonl")]


def state(folder: Path) -> dict[str, Any]:
    path = store.newest(folder / "checkpoints")
    assert path is not None
    body = json.loads((path / "manifest.json").read_text())["body"]
    return {"files": body["files"], "evaluated": body["extra"]["evaluated"], "here": body["extra"]["evaluated_here"]}


@pytest.mark.parametrize("fails_at", [3, 6])
@pytest.mark.parametrize("moment", ["before", "after its row"])
def test_an_evaluation_that_fails_costs_no_step_and_is_repeated(
    fails_at: int, moment: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"checkpoint__every": 3}
    pretrain(configured(tmp_path, data, "whole", **every), ALONE)
    with monkeypatch.context() as patch:
        if moment == "before":
            evaluate = PretrainTask.evaluate

            def failing(task: PretrainTask, done: int) -> Any:
                if done == fails_at:
                    raise RuntimeError("the evaluation failed")
                return evaluate(task, done)

            patch.setattr(PretrainTask, "evaluate", failing)
        else:
            told = []

            def killed(*_: Any) -> None:
                told.append(1)
                if len(told) == fails_at // 3:
                    raise RuntimeError("killed between the row and the checkpoint's manifest")

            patch.setattr(store, "amend", killed)
        with pytest.raises(RuntimeError):
            pretrain(configured(tmp_path, data, "broken", **every), ALONE)
    assert store.newest(tmp_path / "broken" / "checkpoints").name == f"step-0000000{fails_at}"  # type: ignore[union-attr]
    pretrain(configured(tmp_path, data, "broken", **every), ALONE)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert state(tmp_path / "broken") == state(tmp_path / "whole")
    assert state(tmp_path / "whole")["here"]
    before = rows(tmp_path / "broken")
    pretrain(configured(tmp_path, data, "broken", **every), ALONE)
    assert rows(tmp_path / "broken") == before, "nothing is left to do, nor to repeat"


def failing_saves(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[int]:
    """Makes the saves of these numbers, from 1, fail as on a full disk; returns the list of all that were tried."""
    tried: list[int] = []
    write = writing.write_tensors

    def write_tensors(*args: Any) -> Any:
        tried.append(len(tried) + 1)
        if len(tried) in numbers:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(writing, "write_tensors", write_tensors)
    return tried


def test_training_goes_on_when_a_save_fails(tmp_path: Path, data: Path, monkeypatch, caplog) -> None:
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    failing_saves(monkeypatch, 1, 2)
    pretrain(configured(tmp_path, data, "broken"), ALONE)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2 and all("No space left on device" in text and "bytes are free" in text for text in told)
    assert "training goes on until the next save (failure 1 in a row, 3 end the run)" in told[0]
    assert state(tmp_path / "broken") == state(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_a_stop_saves_again_what_could_not_be_saved_a_moment_before(tmp_path: Path, data: Path, monkeypatch) -> None:
    """The signal comes in the step after which a save is due, and that save fails."""
    monkeypatch.setattr("ijepa_scale.train.saver._PAUSE", 0)
    tried = failing_saves(monkeypatch, 1)
    take, asked = PretrainTask.step, []

    def step(task: PretrainTask, batch: Any) -> Any:
        asked.extend(["SIGTERM"] * (batch.step == 1))
        return take(task, batch)

    monkeypatch.setattr(PretrainTask, "step", step)
    monkeypatch.setattr(stopping, "reason", lambda: asked[0] if asked else None)
    with pytest.raises(stopping.Stopped, match="SIGTERM; saved .*step-00000002: start the same command again"):
        pretrain(configured(tmp_path, data, "broken"), ALONE)
    assert len(tried) == 2
    newest = store.newest(tmp_path / "broken" / "checkpoints")
    assert newest is not None and newest.name == "step-00000002"


def test_the_bad_step_is_what_ends_a_run_that_cannot_save_either(
    tmp_path: Path, data: Path, monkeypatch, caplog
) -> None:
    failing_saves(monkeypatch, 1)
    take = PretrainTask.step

    def step(task: PretrainTask, batch: Any) -> Any:
        if batch.step == 1:
            raise NonFiniteError("step 1: process 0 has loss nan", 1)
        return take(task, batch)

    monkeypatch.setattr(PretrainTask, "step", step)
    with pytest.raises(NonFiniteError, match="loss nan"):
        pretrain(configured(tmp_path, data, "broken", checkpoint__max_failures=1), ALONE)
    assert "No space left on device" in caplog.text


def test_the_last_save_is_tried_again(tmp_path: Path, data: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("ijepa_scale.train.saver._PAUSE", 0)
    tried = failing_saves(monkeypatch, 3, 4)  # of saves at steps 2, 4, 6
    pretrain(configured(tmp_path, data, "broken"), ALONE)
    assert len(tried) == 5 and caplog.text.count("trying again in 0 s") == 2
    assert store.newest(tmp_path / "broken" / "checkpoints") == tmp_path / "broken" / "checkpoints" / "step-00000006"


def test_too_many_failures_in_a_row_end_the_run(tmp_path: Path, data: Path, monkeypatch, caplog) -> None:
    tried = failing_saves(monkeypatch, 2, 3)
    with pytest.raises(SaveError, match="No space left"):
        pretrain(configured(tmp_path, data, "broken", checkpoint__max_failures=2), ALONE)
    assert len(tried) == 3
    assert store.newest(tmp_path / "broken" / "checkpoints") == tmp_path / "broken" / "checkpoints" / "step-00000002"
    monkeypatch.undo()
    pretrain(configured(tmp_path, data, "broken"), ALONE)
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    assert state(tmp_path / "broken") == state(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path: Path, data: Path, caplog) -> None:
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    pretrain(configured(tmp_path, data, "broken", schedule__stop_after=4), ALONE)
    file = tmp_path / "broken" / "checkpoints" / "step-00000004" / "process-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    pretrain(configured(tmp_path, data, "broken"), ALONE)
    assert "step-00000004 is set aside as damaged-step-00000004" in caplog.text
    assert state(tmp_path / "broken") == state(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def stopped_at(moment: float, config: PretrainConfig) -> str | None:
    """Runs until a signal comes after `moment` seconds, and returns what is said, or None if the run ended before."""
    number = random.choice(stopping.SIGNALS)
    timer = threading.Timer(moment, os.kill, (os.getpid(), number))
    before = signal.signal(number, lambda *_: None)  # the run may not listen yet, or no more
    timer.start()
    try:
        pretrain(config, ALONE)
    except stopping.Stopped as stopped:
        return str(stopped)
    finally:
        timer.cancel()
        timer.join()
        signal.signal(number, before)
    return None


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.long)])
def test_random_moments(times: int, tmp_path: Path, data: Path) -> None:
    """Every stop saves the newest step, whatever the run is doing, and the run that goes on equals one undisturbed."""
    begin = time.monotonic()
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    took = time.monotonic() - begin
    stops = 0
    while stops < times:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        said: str | None = ""
        while said is not None:
            said = stopped_at(random.uniform(0, took), configured(tmp_path, data, "broken"))
            if said is not None and "no step was taken" not in said:
                stops += 1
                steps = [row["step"] for row in rows(tmp_path / "broken") if "loss" in row]
                newest = store.newest(tmp_path / "broken" / "checkpoints")
                assert newest is not None and f"saved {newest}: start" in said
                assert newest.name == f"step-{max(steps):08d}"
        assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
        assert state(tmp_path / "broken") == state(tmp_path / "whole")


def test_a_best_state_that_cannot_be_saved_is_not_the_best(tmp_path: Path, data: Path, monkeypatch, caplog) -> None:
    """The one before is, so the next that is better than that is kept."""
    write, best = writing.write_tensors, []

    def failing(path: Path, *args: Any) -> Any:
        if path.parents[1].name == "best":
            best.append(path.parent.name)
            if len(best) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args)

    monkeypatch.setattr(writing, "write_tensors", failing)
    evaluate = PretrainTask.evaluate
    monkeypatch.setattr(
        "ijepa_scale.train.pretrain.PretrainTask.evaluate",
        lambda task, done: dataclasses.replace(evaluate(task, done), is_best=done >= 4),
    )
    forgotten = []
    monkeypatch.setattr(PretrainTask, "forget_best", lambda _: forgotten.append(len(best)))
    pretrain(configured(tmp_path, data, "run", evaluate__every=2), ALONE)
    assert forgotten == [1] and len(best) == 2
    assert "this state isn't kept as the best (failure 1 in a row, 3 end the run)" in caplog.text

"""A replayed step has the images, the masks, the loss and the gradient of the run's step."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.train.pretrain import PretrainTask
from ijepa_scale.train.replay import Replayed, options_of, replay
from launch import replay as script
from tests.distributed.commands import write_data
from tests.distributed.spiking import rows
from tests.unit.train.test_spiking import spikes_at, trained
from tests.unit.train.test_start import ALONE, data

__all__ = ["data"]
ROOT = Path(__file__).parents[3]


def replayed(run: Path, step: int, *settings: str, exact: bool = True) -> Replayed:
    return replay(options_of(run, step, exact=exact, to=None, started=1, overrides=settings), ALONE)


def text(found: Replayed) -> str:
    return "\n".join(found.lines())


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ((), (0, 25)),
        (("masks.context=packed", "engine.accumulation=2", "checkpoint.keep=9"), (13, 24)),
        (("optimizer.clip_norm=0.1", "checkpoint.every=0"), (9,)),
    ],
    ids=["dense", "packed", "clipped"],
)
def test_an_exact_replay_equals_the_row_and_changes_nothing(
    settings: tuple[str, ...], steps: tuple[int, ...], tmp_path: Path, data: Path
) -> None:
    run, _ = trained(tmp_path, data, "run", *settings, spikes={})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for step in steps:
        found = replayed(run, step)
        row = next(row for row in rows(run) if row["step"] == step + 1 and "loss" in row)
        assert (found.loss, found.grad_norm) == (row["loss"], row["grad_norm"])
        assert found.weights_step == step and "equal to the run's row, bit for bit" in text(found)
        assert math.hypot(*found.block_norms.values()) == pytest.approx(found.grad_norm, rel=1e-5)
        assert [sample.position for sample in found.samples] == [*range(8)]
        assert np.mean([sample.loss for sample in found.samples]) == pytest.approx(found.loss, rel=0.05)
        written = run / "replay" / f"step-{step:08d}"
        assert json.loads((written / "step.json").read_text())["loss"] == found.loss
        assert Image.open(written / "batch.png").size[0] > 500
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_samples_are_those_of_the_step(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, list[int]] = {}
    step = PretrainTask.step

    def noting(task: PretrainTask, batch: Any) -> Any:
        taken[batch.step] = batch.sample_ids.tolist()
        return step(task, batch)

    monkeypatch.setattr(PretrainTask, "step", noting)
    run, _ = trained(tmp_path, data, "run", "schedule.stop_after=10", spikes={})
    monkeypatch.undo()
    found = replayed(run, 9, exact=False)
    assert [sample.sample_id for sample in found.samples] == taken[9]
    assert all(sample.name.endswith(f":{sample.sample_id:03d}") for sample in found.samples)
    assert (found.weights_step, found.weights) == (8, f"{run}/checkpoints/step-00000008")
    assert "the run had taken 1 step more; --exact takes them again" in text(found)
    row = rows(run)[9]
    assert found.loss == pytest.approx(row["loss"], rel=0.1) and found.loss != row["loss"]
    assert found.worst == sorted(found.samples, key=lambda sample: -sample.loss)[:6]
    assert replayed(run, 12, exact=False).row is None, "a step that the run hasn't taken yet"


def test_the_state_of_a_run_that_ended_at_the_step_is_taken(tmp_path: Path, data: Path) -> None:
    run, _ = trained(tmp_path, data, "run", "spikes.action=stop", spikes=spikes_at(27))
    found = replayed(run, 27, exact=False)
    assert (found.weights_step, found.weights) == (27, f"{run}/stopped/step-00000027")
    whole, _ = trained(tmp_path, data, "whole", spikes={})
    row = next(row for row in rows(whole) if row["step"] == 28)
    assert (found.loss, found.grad_norm) == (row["loss"], row["grad_norm"])
    assert replayed(whole, 1, exact=False).weights == "the start of the run", "kept checkpoints are newer"


def test_a_step_that_is_not_finite_is_shown(tmp_path: Path, data: Path) -> None:
    run, ended = trained(tmp_path, data, "run", "optimizer.lr=1e9", "optimizer.start_lr=1e9", spikes={})
    assert ended.startswith("NonFiniteError: step ")
    step = int(ended.split()[2].rstrip(":"))
    assert f"python launch/replay.py {run} --step {step}" in ended
    found = replayed(run, step, exact=False)
    assert found.weights == f"{run}/stopped/step-{step:08d}"
    assert not (math.isfinite(found.loss) and math.isfinite(found.grad_norm))
    assert not all(map(math.isfinite, found.block_norms.values()))
    written = json.loads((run / "replay" / f"step-{step:08d}" / "step.json").read_text())
    assert None in (written["loss"], written["grad_norm"])


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_the_steps_before_are_taken_as_the_run_took_them(action: str, tmp_path: Path) -> None:
    """With a rate so high and limits so low that some steps of this run are left out, and left out again."""
    limits = ("optimizer.lr=1", "spikes.norm_factor=1.5", "spikes.loss_factor=1.5", "spikes.most=99")
    data = write_data(tmp_path / "data")
    run, _ = trained(tmp_path, data, "run", *limits, f"spikes.action={action}", "checkpoint.keep=9", spikes={})
    lost = [row["step"] - 1 for row in rows(run) if "lr" in row and row["loss"] is None]
    assert lost, "the run left no step out"
    after = next(step for step in range(lost[0], 36) if step not in lost)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > lost[0]:
            shutil.rmtree(path)
    found = replayed(run, after)
    assert "equal to the run's row, bit for bit" in text(found), text(found)
    assert int(found.weights[-8:]) <= lost[0] and found.weights_step == after
    assert "the run left this step out, so its row has no loss" in text(replayed(run, lost[0]))


def test_refusals(tmp_path: Path, data: Path) -> None:
    run, _ = trained(tmp_path, data, "run", "schedule.stop_after=4", spikes={})
    with pytest.raises(ConfigError, match=r"step is 36, but the steps of .*run are 0 to 35"):
        replayed(run, 36)
    with pytest.raises(ConfigError, match=r"3 processes were started, but .*run had 1; start 1$"):
        options_of(run, 1, exact=False, to=None, started=3, overrides=())
    with pytest.raises(CheckpointError, match=r"augment.flip was 0.0, is 0.1"):
        replayed(run, 4, "augment.flip=0.1")
    with pytest.raises(ConfigError, match=r"data.reader is stream, whose batches aren't functions of the step"):
        replayed(run, 0, "data.reader=stream", "evaluate.every=0", "checkpoint.every=0")
    with pytest.raises(ConfigError, match=r"has no config.yaml; give the folder of a run"):
        replayed(tmp_path, 0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"encoder": {}}}))
    with pytest.raises(ConfigError, match="is a finetuning run; only steps of pretraining runs can be replayed"):
        replayed(tmp_path / "tuned", 0)
    (run / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="doesn't say how many processes the run had"):
        replayed(run, 0)


def test_the_script(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run, _ = trained(tmp_path, data, "run", "schedule.stop_after=10", spikes={})
    monkeypatch.setattr(sys, "argv", ["replay.py", str(run), "--step", "9", "--exact", "--to", str(tmp_path / "out")])
    script.main()
    said = capsys.readouterr().out
    assert said.startswith("step 9, epoch ") and "equal to the run's row, bit for bit" in said
    assert f"{tmp_path}/out/batch.png" in said and (tmp_path / "out" / "batch.png").is_file()

"""What a run does at spikes and values that aren't finite, in one process, on the CPU and as on a GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ijepa_scale import stopping
from ijepa_scale.checkpoint import store
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.protocol import StepInfo
from ijepa_scale.train.pretrain import PretrainTask
from tests.distributed.spiking import FACTOR, configured, final_state, left_out, rows, train
from tests.unit.train.test_start import ALONE, data

__all__ = ["data"]
NAN = float("nan")
Spikes = Mapping[int, tuple[float, int | None]]


def spikes_at(*steps: int, factor: float = FACTOR) -> Spikes:
    return {step: (factor, None) for step in steps}


def trained(
    tmp_path: Path, data: Path, name: str, *settings: str, spikes: Spikes, late: bool = False, kill: int | None = None
) -> tuple[Path, str]:
    path, folder = tmp_path / f"{name}.yaml", tmp_path / name
    configured(path, data, folder)
    return folder, train(ALONE, path, settings, spikes, late=late, kill=kill)


def same(first: Path, second: Path) -> None:
    """Checks that two runs have the same rows and end with the same bits."""
    assert rows(first) == rows(second)
    same_state(first, second)


def same_state(first: Path, second: Path) -> None:
    """Checks that two runs end with the same bits, and know the same of spikes."""
    known = [store.Checkpoint(store.newest(run / "checkpoints")).extra for run in (first, second)]  # type: ignore[arg-type]
    assert known[0]["spikes"] == known[1]["spikes"] and known[0]["steps_before"] == known[1]["steps_before"]
    found, expected = final_state(first), final_state(second)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("settings", "spikes", "skipped"),
    [
        (("spikes.action=skip",), spikes_at(23, 24, 30), 3),
        (("spikes.action=rollback",), spikes_at(27, 33), 6),  # to 24, then to 32
        (("spikes.action=rollback",), spikes_at(27, 28), 5),  # twice to 24
        (("spikes.skip_nonfinite=2",), spikes_at(3, 22, 23, factor=NAN), 3),
    ],
    ids=["skip", "rollback", "rollback twice to one", "nan"],
)
def test_a_killed_run_goes_on_as_one_that_was_not(
    settings: tuple[str, ...], spikes: Spikes, skipped: int, tmp_path: Path, data: Path
) -> None:
    """Also where the device decides, as on a GPU (`late`)."""
    whole, ended = trained(tmp_path, data, "whole", *settings, spikes=spikes)
    assert ended == ""
    for kill, late in ((25, False), (29, True), (34, True)):
        name = f"killed-{kill}"
        broken, ended = trained(tmp_path, data, name, *settings, spikes=spikes, late=late, kill=kill)
        assert ended == "Killed: "
        broken, ended = trained(tmp_path, data, name, *settings, spikes=spikes, late=late)
        assert ended == ""
        same(broken, whole)
    assert left_out(whole) == skipped == rows(whole)[-1]["steps_skipped"]


def test_a_warning_changes_nothing_and_says_what_to_do(tmp_path: Path, data: Path, caplog) -> None:
    quiet, _ = trained(tmp_path, data, "quiet", "spikes.action=none", spikes=spikes_at(21, 22, 30))
    warned, ended = trained(tmp_path, data, "warned", spikes=spikes_at(21, 22, 30))
    assert ended == ""
    same(warned, quiet)
    told = [record.getMessage() for record in caplog.records if "running median" in record.getMessage()]
    assert len(told) == 1, "the others are within the window of 20 steps"
    assert told[0].startswith("step 21: gradient norm ") and "; it was taken (spikes.action=warn)" in told[0]
    assert f"python launch/replay.py {warned} --step 21 shows its batch" in told[0]
    assert "steps_skipped" not in rows(warned)[-1]


@pytest.mark.parametrize(
    ("settings", "spikes", "error", "end"),
    [
        (("spikes.action=stop",), spikes_at(23), "SpikeError: step 23: gradient norm ", 23),
        (("spikes.action=skip", "spikes.most=3"), spikes_at(*range(21, 33)), "SpikeError: step 23: gradient norm ", 23),
        (("spikes.action=rollback", "spikes.most=3"), spikes_at(*range(26, 33)), "SpikeError: step 28: gradient ", 28),
        (
            ("spikes.action=rollback", "spikes.most=2", "checkpoint.every=12"),
            spikes_at(26, 29),
            "SpikeError: step 29: spikes have led back to the checkpoint of step 24 2 times (spikes.most)",
            29,
        ),
        ((), {5: (NAN, 0)}, "NonFiniteError: step 5: the gradient norm is nan", 5),
        (("spikes.skip_nonfinite=2",), spikes_at(5, 6, 7, factor=NAN), "NonFiniteError: step 7: the gradient norm", 7),
    ],
    ids=["stop", "skip", "rollback", "rollback to one checkpoint", "nan", "nans"],
)
def test_a_run_ends_where_it_must_with_its_state(
    settings: tuple[str, ...], spikes: Spikes, error: str, end: int, tmp_path: Path, data: Path
) -> None:
    found = []
    for late in (False, True):
        folder, ended = trained(tmp_path, data, f"late-{late}", *settings, spikes=spikes, late=late)
        assert ended.startswith(error), ended
        assert f"python launch/replay.py {folder} --step {end}" in ended
        stopped = store.newest(folder / "stopped")
        assert stopped is not None and stopped.name == f"step-{end:08d}"
        assert max(row["step"] for row in rows(folder)) <= end
        found.append(store.Checkpoint(stopped).full(""))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_without_a_checkpoint_a_rollback_leaves_out_the_step_and_says_so(tmp_path: Path, data: Path, caplog) -> None:
    every = "checkpoint.every=0"
    back, _ = trained(tmp_path, data, "back", every, "spikes.action=rollback", spikes=spikes_at(25))
    assert "there is no checkpoint to go back to yet, so only this step is left out" in caplog.text
    skip, _ = trained(tmp_path, data, "skip", every, "spikes.action=skip", spikes=spikes_at(25))
    events = [row for row in rows(back) if "rolled_back_to" in row]
    assert events == [{"step": 26, "rolled_back_to": None, "steps_skipped": 1}]
    assert [row for row in rows(back) if row not in events] == rows(skip)
    assert all(torch.equal(a, b) for a, b in zip(final_state(back).values(), final_state(skip).values(), strict=True))


def test_going_back_is_in_the_log_and_in_a_row(tmp_path: Path, data: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    folder, _ = trained(tmp_path, data, "run", "spikes.action=rollback", spikes=spikes_at(27))
    assert caplog.text.count("went back to") == 1
    assert f"went back to {folder}/checkpoints/step-00000024, and leaves out the steps from 24 to 27" in caplog.text
    events = [row for row in rows(folder) if "rolled_back_to" in row]
    assert events == [{"step": 28, "rolled_back_to": 24, "steps_skipped": 4}]
    taken = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in taken] == [*range(1, 37)]
    assert taken[27]["loss"] is None, "the step with the spike isn't in a mean"


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path, data: Path, caplog) -> None:
    path = tmp_path / "run.yaml"
    configured(path, data, tmp_path / "run")
    settings = ("spikes.action=rollback", "schedule.stop_after=25")
    assert train(ALONE, path, settings, {}) == ""
    file = tmp_path / "run" / "checkpoints" / "step-00000024" / "process-00000.safetensors"
    whole = file.read_bytes()
    extra = json.loads((file.parent / "manifest.json").read_text())["body"]["extra"]
    assert len(extra["spikes"]["losses"]) == 20 and extra["spikes"]["skipped"] == 0
    file.write_bytes(whole[:-1] + b"?")
    train(ALONE, path, settings[:1], spikes_at(26))
    assert "step-00000025, and leaves out the steps from 25 to 26" in caplog.text


@pytest.mark.parametrize("spikes", [{27: (NAN, None)}, spikes_at(27)], ids=["nan", "spike"])
@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_is_stopped_judges_its_last_step_first(
    late: bool, spikes: Spikes, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is due there, and on a GPU the host wouldn't have read the values of that step yet."""
    settings = ("spikes.action=skip", "spikes.skip_nonfinite=1", "logging.every=12")
    whole, _ = trained(tmp_path, data, "whole", *settings, spikes=spikes)
    take = PretrainTask.step
    for asked in (25, 26):
        with monkeypatch.context() as patch:

            def step(task: PretrainTask, batch: Batch, asked: int = asked) -> StepInfo:
                if batch.step == asked + 1 - late:
                    patch.setattr(stopping, "reason", lambda: "SIGTERM")
                return take(task, batch)

            patch.setattr(PretrainTask, "step", step)
            with pytest.raises(stopping.Stopped, match="saved .*step-000000"):
                trained(tmp_path, data, f"stopped-{asked}", *settings, spikes=spikes, late=late)
        stopped, ended = trained(tmp_path, data, f"stopped-{asked}", *settings, spikes=spikes, late=late)
        assert ended == ""
        same_state(whole, stopped)  # the row of the step after begins with the resumed run


def test_a_checkpoint_of_a_step_that_was_not_finite_is_readable(tmp_path: Path, data: Path) -> None:
    """Its block norms are measured there, and are NaN."""
    settings = ("spikes.skip_nonfinite=1", "health.every=8")
    run, ended = trained(tmp_path, data, "run", *settings, spikes={23: (NAN, None)})
    assert ended == "" and not list((run / "checkpoints").glob("damaged*"))
    stopped, ended = trained(tmp_path, data, "stopped", "health.every=8", spikes={23: (NAN, None)}, late=True)
    newest = store.newest(stopped / "stopped")
    assert "gradient norm is nan" in ended and newest is not None and store.Checkpoint(newest).step == 23

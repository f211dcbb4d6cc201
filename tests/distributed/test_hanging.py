"""A run of which a process or a loader's worker is stopped ends, names it, and goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ijepa_scale.config import load_config
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.engine.world import World
from ijepa_scale.train.pretrain import PretrainTask, pretrain
from tests.distributed.commands import ZERO3, final_hashes, finish, have_ended, losses, rows, start, write_config
from tests.distributed.harness import run
from tests.distributed.test_stopping import LAUNCHES, data, wait_for_step, wait_until_gone, whole, workers

__all__ = ["data", "whole"]

TIMEOUT_S = 5.0
EACH_S = 0.15  # that each process takes in each step
ALL = [(launch, whom) for launch in LAUNCHES for whom in ("process 0", "process 1", "loader")]
ALL = [case for case in ALL if case[0] != "alone" or case[1] == "loader"]
QUICK = ("evaluate.every=0", "health.every=0", "health.keep_best=none")
SHORT = [("torchrun fsdp2", "process 0")]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in SHORT)]


def trainers(process: subprocess.Popen, config: Path) -> list[psutil.Process]:
    """Returns the processes of the run by rank, which launchers start in this order."""
    found = workers(process, config) or [psutil.Process(process.pid)]
    return sorted(found, key=lambda each: (each.create_time(), each.pid))


def loader_worker(trainer: psutil.Process) -> psutil.Process:
    """Returns a worker of its loader, which its fork server has started."""
    direct = {child.pid for child in trainer.children()}
    return next(child for child in trainer.children(recursive=True) if child.pid not in direct)


@pytest.mark.parametrize(("launch", "whom"), CASES)
def test_a_stopped_process_ends_the_run_and_is_named(
    launch: str, whom: str, data: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    launcher, arguments = LAUNCHES[launch]
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    short, arguments = (
        (launch, whom) in SHORT,
        (*arguments, f"engine.hang_timeout={TIMEOUT_S:g}", "engine.link_timeout=0", "health.every=0"),
    )
    process = start(config, *arguments, *(QUICK if short else ()), launcher=launcher)
    wait_for_step(4, process, config, folder)
    found = trainers(process, config)
    victim = loader_worker(found[-1]) if whom == "loader" else found[int(whom[-1])]
    victim.suspend()
    begin = time.monotonic()
    log = wait_for_line("(engine.hang_timeout): ", config, process)
    assert time.monotonic() - begin > TIMEOUT_S - 1
    if short and whom != "loader":
        victim.kill()  # launchers give it 30 s before they do
    code = process.wait(timeout=90)
    assert code == 71 if launch in ("alone", "processes") and whom == "loader" else code != 0
    wait_until_gone(config)
    log = config.with_suffix(".log").read_text()
    assert log.count("no step has ended for 5 s (engine.hang_timeout): ") == 1, log
    rank = len(found) - 1 if whom == "loader" else int(whom[-1])
    named = f"process {rank} ({found[rank].pid} on "
    if whom == "loader":
        assert ": waiting for the data of step " in log and named in log, log
        assert f"; its child {victim.pid} is stopped; the stacks are in {folder}/stacks/" in log, log
        assert have_ended([victim], 60)
    else:
        assert f"no answer from {named}" in log and "); it is stopped; the stacks are in " in log, log
    answered = [number for number in range(len(found)) if whom == "loader" or number != rank]
    (stacks,) = (folder / "stacks").iterdir()
    assert sorted(path.name for path in stacks.glob("process-*")) == [f"process-{n:05d}.txt" for n in answered]
    assert all("loop.py" in path.read_text() for path in stacks.glob("process-*"))
    if not short:
        finish(start(config, *arguments, launcher=launcher), config)
        expected = request.getfixturevalue("whole")[launch]
        assert losses(folder) == losses(expected)
        assert final_hashes(folder) == final_hashes(expected)


def wait_for_line(text: str, config: Path, process: subprocess.Popen) -> str:
    def there() -> bool:
        assert process.poll() is None or text in config.with_suffix(".log").read_text()
        return text in config.with_suffix(".log").read_text()

    wait_until(there)
    return config.with_suffix(".log").read_text()


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.long
def test_a_run_that_sleeps_goes_on(data: Path, tmp_path: Path) -> None:
    """All of it stops for longer than the timeout, as after Ctrl-Z."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    process = start(config, f"engine.hang_timeout={TIMEOUT_S:g}", "engine.link_timeout=0")
    wait_for_step(4, process, config, folder)
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everything:
        each.suspend()
    time.sleep(2 * TIMEOUT_S)
    for each in everything:
        each.resume()
    assert "hang_timeout" not in finish(process, config)


@pytest.mark.long
def test_a_run_that_is_asked_to_stop_while_it_hangs_ends(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    process = start(config, "--processes", "2", f"engine.hang_timeout={TIMEOUT_S:g}", "schedule.epochs=200")
    wait_for_step(4, process, config, folder)
    stopped = trainers(process, config)[1]
    stopped.suspend()
    time.sleep(1)
    os.kill(process.pid, 15)
    wait_for_line("no answer from process 1", config, process)
    process.wait(timeout=60)
    wait_until_gone(config)


def slowed_run(world: World, config: Path, overrides: list[str], waits: dict[str, float]) -> None:
    """Trains; process 1 takes so many seconds more in each step."""
    late, build, iterate = waits if world.rank == 1 else {}, PretrainTask.__init__, TrainLoader.__iter__

    def init(task: PretrainTask, *args: Any, **options: Any) -> None:
        build(task, *args, **options)
        augment = task._take_step.augment

        def augmented(micro: Any) -> Any:
            time.sleep(EACH_S + late.get("augment", 0.0))
            return augment(micro)

        task._take_step.augment = augmented

    def batches(loader: TrainLoader) -> Iterator[Any]:
        for batch in iterate(loader):
            time.sleep(late.get("data", 0.0))
            yield batch

    PretrainTask.__init__, TrainLoader.__iter__ = init, batches  # type: ignore[method-assign]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        pretrain(load_config(config, overrides), world)
    if world.is_main:
        config.with_suffix(".log").write_text(shown.getvalue())


@pytest.mark.parametrize(
    ("launch", "slow"),
    [
        ("ddp", {"data": 0.4}),
        pytest.param("ddp", {"augment": 0.5}, marks=pytest.mark.long),
        pytest.param("fsdp2", {"augment": 0.5}, marks=pytest.mark.long),
        pytest.param("zero3", {"data": 0.4}, marks=pytest.mark.long),
        pytest.param("ddp", {}, marks=pytest.mark.long),
    ],
)
def test_the_slowest_process_is_named(launch: str, slow: dict[str, float], data: Path, tmp_path: Path) -> None:
    """One of three is late by a set time; in a healthy run none is named."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    overrides = [
        *QUICK, "data.batch_size=12", "data.workers=0", "logging.every=4", "logging.progress=lines",
        "schedule.epochs=1", "schedule.warmup_epochs=0.5", "schedule.steps_per_epoch=8", "checkpoint.every=0",
        "masks.group_size=12", *(ZERO3 if launch == "zero3" else (f"engine.strategy={launch}",)),
    ]  # fmt: skip
    run(slowed_run, 3, config, overrides, slow)
    log = config.with_suffix(".log").read_text()
    assert len(rows(folder)) == 2 and "img/s" in log
    for row in rows(folder):
        late_ms = 1e3 * (EACH_S + sum(slow.values()))
        assert row["slowest_own_ms"] >= 0.99 * late_ms and row["median_own_ms"] >= 990 * EACH_S
        if slow:
            assert row["slowest_process"] == 1 and row["slowest_own_ms"] > row["median_own_ms"] + 200
            assert (row["slowest_data_wait_ms"] >= 390) == ("data" in slow)
            assert f"slow: process 1, {row['slowest_own_ms']:.0f} ms of its own" in log
        else:
            assert "slow: " not in log

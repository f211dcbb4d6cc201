"""A process that ends takes the others with it, and they say who it was instead of how their connections broke."""

from __future__ import annotations

from pathlib import Path

import pytest

from ijepa_scale import environment
from tests.distributed.commands import ROOT, ZERO3, start, write_config, write_data
from tests.distributed.test_hanging import QUICK, trainers
from tests.distributed.test_launch import DEEPSPEED, TORCHRUN
from tests.distributed.test_stopping import wait_for_step, wait_until_gone

LAUNCHES = {
    "processes": ((), ("--processes", "2")),
    "torchrun fsdp2": (TORCHRUN, ("engine.strategy=fsdp2",)),
    "deepspeed zero3": (DEEPSPEED, ZERO3),
}
FAILING = """
from ijepa_scale.errors import DataError
from ijepa_scale.train.pretrain import PretrainTask
take = PretrainTask.step
def step(task, batch):
    if batch.step == 5 and task.world.rank == {rank}:
        raise {error}
    return take(task, batch)
PretrainTask.step = step
"""
ERRORS = {"of a user": ("DataError('no such shard')", 2), "unexpected": ("KeyError('x')", 1)}
long = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.mark.parametrize("kind", ["of a user", pytest.param("unexpected", marks=long)])
@pytest.mark.parametrize("rank", [pytest.param(0, marks=long), 1])
@pytest.mark.parametrize(
    "launch", [name if name == "processes" else pytest.param(name, marks=long) for name in LAUNCHES]
)
def test_an_error_of_one_process_is_told_once(launch: str, rank: int, kind: str, data: Path, tmp_path: Path) -> None:
    launcher, arguments = LAUNCHES[launch]
    error, code = ERRORS[kind]
    (tmp_path / "failing.py").write_text(FAILING.format(rank=rank, error=error))
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    begun = ("--plugin", "failing", *QUICK, *arguments)
    python = f"{tmp_path}:{environment.child_environment().get('PYTHONPATH', ROOT)}"
    process = start(config, *begun, launcher=launcher, PYTHONPATH=python)
    process.wait(timeout=60)
    log = config.with_suffix(".log").read_text()
    assert process.returncode == code if launch == "processes" else process.returncode != 0
    assert "gloo" not in log.replace("cpu:gloo", ""), log
    assert log.count("no such shard") == 1 if kind == "of a user" else log.count("KeyError: 'x'") == 1, log


@pytest.mark.parametrize("rank", [pytest.param(0, marks=long), 1])
@pytest.mark.parametrize(
    "launch", [name if name == "processes" else pytest.param(name, marks=long) for name in LAUNCHES]
)
def test_a_killed_process_is_named(launch: str, rank: int, data: Path, tmp_path: Path) -> None:
    launcher, arguments = LAUNCHES[launch]
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    process = start(config, *QUICK, "schedule.epochs=200", *arguments, launcher=launcher)
    wait_for_step(4, process, config, tmp_path / "run")
    victim = trainers(process, config)[rank]
    victim.kill()
    assert process.wait(timeout=60) != 0
    wait_until_gone(config)
    log = config.with_suffix(".log").read_text()
    named = f"error (process {1 - rank}): process {rank} ({victim.pid} on "
    if (
        launch != "processes" and named not in log
    ):  # a launcher may be faster, which names the first and ends the others
        by_deepspeed = f"'--local_rank={rank}'" in log.rpartition("[ERROR]")[2]
        assert by_deepspeed or f"(exitcode: -9) local_rank: {rank} (pid: {victim.pid})" in log, log[-3000:]
        return
    assert log.count(named) == 1 and ") has ended; start the same command again" in log, log[-3000:]

"""A run that is asked to stop saves its state, exits with 75, and goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.commands import (
    PRETRAIN,
    ZERO3,
    final_hashes,
    finish,
    have_ended,
    losses,
    rows,
    start,
    write_config,
    write_data,
)  # fmt: skip
from tests.distributed.test_launch import DEEPSPEED, TORCHRUN

LAUNCHES = {
    "alone": ((), ()),
    "processes": ((), ("--processes", "2")),
    "torchrun fsdp2": (TORCHRUN, ("engine.strategy=fsdp2",)),
    "deepspeed zero3": (DEEPSPEED, ZERO3),
}
SHORT = [("alone", "SIGTERM", "all")]
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
PLACES = [
    (launch, to) for launch in LAUNCHES for to in ("launcher", "worker", "all") if (launch, to) != ("alone", "worker")
]
LONG = [(launch, NAMES[number % 4], to) for number, (launch, to) in enumerate(PLACES)]
LONG.append(("torchrun fsdp2", "SIGTERM", "launcher"))
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG if case not in SHORT)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the folders of undisturbed runs by launch, run when first asked for."""

    class Wholes(dict):
        def __missing__(self, launch: str) -> Path:
            folder = tmp_path_factory.mktemp("whole")
            launcher, arguments = LAUNCHES[launch]
            config = write_config(folder / "run.yaml", data, folder / "run")
            finish(start(config, *arguments, launcher=launcher), config)
            self[launch] = folder / "run"
            return self[launch]

    return Wholes()


def workers(launcher: subprocess.Popen, config: Path) -> list[psutil.Process]:
    """Returns the processes that train: the script's, or the children that it has spawned, without any launcher."""
    tree = psutil.Process(launcher.pid).children(recursive=True)
    if spawned := [each for each in tree if each.ppid() == launcher.pid and "--multiprocessing-fork" in each.cmdline()]:
        return spawned
    scripts = [each for each in tree if str(config) in each.cmdline()]
    return [each for each in scripts if str(PRETRAIN) in each.cmdline()[1:3]]


def wait_for_step(step: int, process: subprocess.Popen, config: Path, folder: Path) -> None:
    deadline = time.monotonic() + 200
    while len(losses(folder)) < step:
        assert process.poll() is None and time.monotonic() < deadline, config.with_suffix(".log").read_text()
        time.sleep(0.005)


@pytest.mark.parametrize(("launch", "name", "to"), CASES)
def test_a_signal_saves_and_the_run_goes_on(
    launch: str, name: str, to: str, data: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    launcher, arguments = LAUNCHES[launch]
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    process = start(config, *arguments, launcher=launcher)
    wait_for_step(random.SystemRandom().randint(1, 15), process, config, folder)
    number = signal.Signals[name]
    if to == "all":
        os.killpg(process.pid, number)
    elif to == "launcher":
        os.kill(process.pid, number)
    else:
        random.choice(workers(process, config)).send_signal(number)
    process.wait(timeout=100)
    log = config.with_suffix(".log").read_text()
    wait_until_gone(config)
    done = max(losses(folder))
    assert done < 20, "the run ended before it was stopped"
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{done:08d}", log
    if launch in ("alone", "processes"):
        assert process.returncode == 75 and log.count("stopped: ") == 1, log
        assert f"saved {newest}: start the same command again to go on" in log and "Traceback" not in log
    finish(start(config, *arguments, launcher=launcher), config)
    assert losses(folder) == losses(whole[launch])
    assert final_hashes(folder) == final_hashes(whole[launch])


def wait_until_gone(config: Path) -> None:
    """Waits until no process of the run is left."""
    deadline = time.monotonic() + 30
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(config) in (p.info["cmdline"] or ())]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize("launch", ["processes", pytest.param("torchrun fsdp2", marks=pytest.mark.long)])
def test_no_process_outlives_a_killed_launcher(launch: str, data: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    launcher, arguments = LAUNCHES[launch]
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    process = start(config, *arguments, "schedule.epochs=200", launcher=launcher)
    wait_for_step(2, process, config, folder)
    everything, trainers = psutil.Process(process.pid).children(recursive=True), workers(process, config)
    assert len(trainers) == 2
    process.kill()
    process.wait()
    assert have_ended(trainers, 10), config.with_suffix(".log").read_text()
    assert have_ended(everything, 60)  # fork servers take seconds to unload torch
    assert sorted((folder / "checkpoints").glob("step-*"))[-1].name == f"step-{max(losses(folder)):08d}"


@pytest.mark.long
def test_a_second_signal_ends_at_once(data: Path, tmp_path: Path) -> None:
    """Even where the main thread never comes to a step's end, as in a collective that another process doesn't join."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    process = start(config, "--processes", "2")
    wait_for_step(1, process, config, folder)
    stuck, other = workers(process, config)[:2]
    stuck.suspend()
    time.sleep(0.5)
    other.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert other.is_running() and process.poll() is None
    other.send_signal(signal.SIGTERM)
    other.wait(timeout=20)
    assert "ends at once: a second signal, SIGTERM" in config.with_suffix(".log").read_text()
    stuck.kill()
    process.wait(timeout=30)


@pytest.mark.long
def test_rows_of_stopped_and_whole_runs_are_alike(data: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    """Evaluations too: each has one row, with the same result."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", data, folder)
    for _ in range(2):
        process = start(config)
        wait_for_step(len(losses(folder)) + random.SystemRandom().randint(2, 6), process, config, folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 75
    finish(start(config), config)
    evaluated = [[(row["step"], row["knn"]) for row in rows(each) if "knn" in row] for each in (folder, whole["alone"])]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("arguments", [(), ("--processes", "2")], ids=["alone", "processes"])
def test_ctrl_c_before_training_is_no_success(arguments: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    """While images are tried, nothing is lost, and the code says that the run isn't done."""
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    plugin = tmp_path / "slow_start.py"
    plugin.write_text(
        "import time\nfrom ijepa_scale.train.pretrain import PretrainTask\n"
        "def wait(task):\n    print('waiting', flush=True)\n    time.sleep(100)\n"
        "PretrainTask.prepare_evaluation = wait\n"
    )
    process = start(config, "--plugin", "slow_start", *arguments, PYTHONPATH=str(tmp_path))
    count, deadline = 2 if arguments else 1, time.monotonic() + 100
    while config.with_suffix(".log").read_text().count("waiting") < count:
        assert process.poll() is None and time.monotonic() < deadline, config.with_suffix(".log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    log = config.with_suffix(".log").read_text()
    assert log.count("interrupted") == 1 and "Traceback" not in log, log

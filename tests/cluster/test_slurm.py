"""Jobs of a real Slurm of two nodes: however one is disturbed, it ends with the bits of one that never was.

Skipped by name where Slurm can't be started: it needs root and Debian's packages slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing, started
from tests.distributed.commands import (
    ROOT,
    clean_environment,
    final_hashes,
    finish,
    losses,
    start,
    write_config,
    write_data,
)

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

STEPS = 120
SLOW = """
import os, time
import ijepa_scale
from ijepa_scale.train.loop import Loop
after = Loop._after
def slowly(loop, *arguments):
    time.sleep(1 if os.path.exists('slower') else 0.1)
    after(loop, *arguments)
Loop._after = slowly
def run(*arguments):
    return ijepa_scale.run(*arguments)
run.checkpoint = ijepa_scale.run.checkpoint
"""
OVERRIDES = ("schedule.steps_per_epoch=60", "evaluate.every=40", "health.every=40")
WHERE = ("--nodes", "2", "--tasks-per-node", "1", "--gpus-per-node", "0", "--cpus-per-task", "1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with started(tmp_path_factory.mktemp("slurm") / "files") as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "slow.py").write_text(SLOW)
    return write_data(folder / "data")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an undisturbed run of two processes on one host."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "run.yaml", data, folder / "run")
    finish(start(config, "--processes", "2", *OVERRIDES), config)
    return folder / "run"


@pytest.fixture
def command(slurm: Slurm, data: Path, tmp_path: Path) -> Callable[..., str]:
    """Returns a function that runs launch/slurm.py, or another command, on a node, and returns its output."""

    def run(*words: str, script: str = str(ROOT / "launch" / "slurm.py")) -> str:
        variables = slurm.environment() | {"PYTHONPATH": ":".join([str(data.parent), *sys.path[1:], str(ROOT)])}
        found = subprocess.run(
            slurm.command(0, sys.executable, script, *words),
            cwd=tmp_path, env=clean_environment(**variables), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run


def submit(command: Callable[..., str], data: Path, tmp_path: Path, *flags: str) -> str:
    """Submits a run in tmp_path/run of two tasks, one a node, and returns the job's number."""
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    said = command("pretrain", "--config", str(config), "--plugin", "slow", *WHERE, *flags, *OVERRIDES)
    return re.findall(r"job (\d+): ", said)[0]


def wait_for_step(step: int, folder: Path, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while max(losses(folder), default=0) < step:
        assert time.monotonic() < deadline, told(folder)
        time.sleep(0.05)


def told(folder: Path) -> str:
    """Returns what a job's processes have printed, and its record."""
    return "\n".join(
        path.read_text()[-4000:] for pattern in ("logs/*", "slurm/*.jsonl") for path in folder.glob(pattern)
    )


def endings(folder: Path) -> list[tuple[int, str]]:
    """Returns exit code and checkpoint of each end of a job's tasks."""
    events = map(json.loads, (folder / "slurm" / "jobs.jsonl").read_text().splitlines())
    return [(event["code"], event["checkpoint"]) for event in events if event["event"] == "ended"]


def repeated(folder: Path) -> int:
    """Returns how many steps were taken more than once."""
    lines = (folder / "logs" / "process-00000.log").read_text().splitlines()
    steps = [int(found[1]) for line in lines if (found := re.search(rf"step +(\d+)/{STEPS}  loss", line))]
    return len(steps) - len(set(steps))


def equal(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole) and len(losses(whole)) == STEPS, told(folder)
    assert final_hashes(folder) == final_hashes(whole)


def test_two_tasks_on_two_nodes(
    slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path
) -> None:
    name = """it's a "name" \\ of $HOME, `x` and %j #1"""
    job = submit(command, data, tmp_path, "--name", name, "--sbatch", f"comment={name}", "--time", "10")
    found = slurm.wait(job, "COMPLETED", "FAILED")
    assert found["JobState"] == "COMPLETED", told(tmp_path / "run")
    shown = slurm.run("scontrol", "show", "job", job)
    assert f"JobName={name}\n" in shown and f"Comment={name} \n" in shown and "TimeLimit=00:10:00" in shown
    equal(tmp_path / "run", whole)
    assert endings(tmp_path / "run") == [(0, f"step-{STEPS:08d}")] and repeated(tmp_path / "run") == 0
    hosts = [line.rpartition(" on ")[2] for line in command("logs", "run").splitlines() if " begins: " in line]
    assert sorted(hosts) == [f"slurma, job {job}", f"slurmb, job {job}"]
    assert f"job {job}: COMPLETED on slurma,slurmb" in command("status", "run")


def test_a_requeued_job(slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path) -> None:
    """As after preemption, or by an operator."""
    job = submit(command, data, tmp_path)
    wait_for_step(20, tmp_path / "run")
    slurm.run("scontrol", "requeue", job)
    check_resumed(slurm, job, tmp_path / "run", whole)


def preempted_by_another(slurm: Slurm, job: str, folder: Path) -> None:
    said = slurm.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", f"--chdir={folder}", "--wrap", "sleep 3"
    )
    other = said.split()[-1]
    assert slurm.wait(other, "RUNNING", "COMPLETED")["Partition"] == "urgent"
    assert slurm.job(job)["JobState"] in ("PENDING", "COMPLETING", "REQUEUED"), slurm.job(job)
    assert slurm.wait(other, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"


@pytest.mark.nightly
def test_the_time_limit(slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path) -> None:
    """Slurm sends the signal up to a minute earlier than asked for."""
    job = submit(command, data, tmp_path, "--time", "10", "--notice", "60")
    wait_for_step(20, tmp_path / "run")
    near_its_limit(slurm, job, tmp_path)
    check_resumed(slurm, job, tmp_path / "run", whole)
    assert "SIGUSR1; saved" in (tmp_path / "run" / "logs" / "process-00000.log").read_text()


def near_its_limit(slurm: Slurm, job: str, folder: Path) -> None:
    """Draws the limit in when the run has begun. Slurm looks at limits every 30 seconds."""
    (folder / "slower").touch()
    slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=1")
    slurm.wait(job, "PENDING")
    (folder / "slower").unlink()
    slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=10")


def check_resumed(slurm: Slurm, job: str, folder: Path, whole: Path) -> None:
    """Waits for a job that has had a notice; it may repeat no step."""
    found = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    assert found["JobState"] == "COMPLETED" and found["Restarts"] == "1", (found, told(folder))
    equal(folder, whole)
    (code, checkpoint), last = endings(folder)
    assert code == 75 and "step-00000020" <= checkpoint < f"step-{STEPS:08d}" and last[0] == 0
    assert repeated(folder) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("node", [0, 1], ids=["first", "second"])
def test_a_lost_node(
    node: int, slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path
) -> None:
    """The first one runs the job's file, so only Slurm can start the job again; it waits for SlurmdTimeout to do so."""
    job = submit(command, data, tmp_path)
    folder = tmp_path / "run"
    wait_for_step(20, folder)
    slurm.lose_node(node)
    slurm.wait(job, "PENDING", timeout=150)
    time.sleep(2)  # the node comes back when the job has ended on the other one
    slurm.start_node(node)
    found = slurm.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED", timeout=240)
    assert found["JobState"] == "COMPLETED" and int(found["Restarts"]) >= 1, (found, told(folder))
    equal(folder, whole)
    assert repeated(folder) <= 3 + 1  # since the checkpoint, which each third step has


@pytest.mark.nightly
def test_a_killed_process(slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path) -> None:
    """No notice, and no node that Slurm could miss: the job requeues itself."""
    job = submit(command, data, tmp_path)
    folder = tmp_path / "run"
    wait_for_step(20, folder)
    trainers = [number for number in slurm.processes(1) if is_trainer(number)]
    assert len(trainers) == 1
    os.kill(trainers[0], signal.SIGKILL)
    found = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert found["JobState"] == "COMPLETED" and found["Restarts"] == "1", (found, told(folder))
    equal(folder, whole)
    assert [code for code, _ in endings(folder)] == [128 + signal.SIGKILL, 0] and repeated(folder) <= 3 + 1


def is_trainer(number: int) -> bool:
    words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    return Path(os.fsdecode(words[0])).name.startswith("python") and b"pretrain.py" in words[1][-11:]


@pytest.mark.nightly
def test_a_cancelled_job(slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path) -> None:
    job = submit(command, data, tmp_path)
    folder = tmp_path / "run"
    wait_for_step(20, folder)
    assert f"job {job} cancelled" in command("cancel", "run")
    assert slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING")["JobState"] == "CANCELLED", told(folder)
    deadline = time.monotonic() + 40
    while not endings(folder):
        assert time.monotonic() < deadline, told(folder)
        time.sleep(0.2)
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED", "nothing starts it again"
    again = submit(command, data, tmp_path)
    assert slurm.wait(again, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", told(folder)
    equal(folder, whole)
    assert [code for code, _ in endings(folder)] == [75, 0] and repeated(folder) == 0


@pytest.mark.nightly
def test_an_array_trains_in_named_folders(
    slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path
) -> None:
    job = submit(command, data, tmp_path, "--array", "seed=0,1")
    for number in range(2):
        assert slurm.wait(f"{job}_{number}", "COMPLETED", "FAILED", timeout=240)["JobState"] == "COMPLETED"
    first, second = tmp_path / "run" / "seed-0", tmp_path / "run" / "seed-1"
    assert losses(first) == losses(whole) and losses(second) != losses(whole)
    lines = command("status", "run").splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"job {job}_0", f"job {job}_1"]


SUBMIT = """
import sys, submitit, slow
executor = submitit.AutoExecutor(folder="submitit", cluster="slurm")
executor.update_parameters(nodes=2, tasks_per_node=1, cpus_per_task=1, timeout_min=10)
executor.update_parameters(slurm_partition="debug", slurm_additional_parameters={"requeue": True})
print(executor.submit(slow.run, sys.argv[1], sys.argv[2:]).job_id)
"""


def submit_by_submitit(command: Callable[..., str], data: Path, tmp_path: Path) -> str:
    """Submits ijepa_scale.run for a run in tmp_path/run of two tasks, one a node, and returns the job's number."""
    pytest.importorskip("submitit")
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    (tmp_path / "submit.py").write_text(SUBMIT)
    return command(str(config), *OVERRIDES, script=str(tmp_path / "submit.py")).split()[-1]


def requeued(slurm: Slurm, job: str, _: Path) -> None:
    slurm.run("scontrol", "requeue", job)


def told_to_requeue(slurm: Slurm, job: str, _: Path) -> None:
    slurm.run("scancel", "--signal=USR2", job)


def without_a_node(slurm: Slurm, job: str, _: Path, node: int) -> None:
    slurm.lose_node(node)
    slurm.wait(job, "PENDING", timeout=150)
    time.sleep(2)
    slurm.start_node(node)


DISTURBANCES: dict[str, tuple[Callable[[Slurm, str, Path], None] | None, int]] = {
    "undisturbed": (None, 0),
    "requeue": (requeued, 0),
    "limit": (near_its_limit, 0),
    "preempted": (preempted_by_another, 0),
    "USR2": (told_to_requeue, 0),
    "first-node": (partial(without_a_node, node=0), 3 + 1),
    "second-node": (partial(without_a_node, node=1), 3 + 1),
}


@pytest.mark.parametrize(
    "name", [name if name == "USR2" else pytest.param(name, marks=pytest.mark.nightly) for name in DISTURBANCES]
)
def test_submitit(
    name: str, slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path
) -> None:
    """Its jobs call ijepa_scale.run. Without notice the steps since the checkpoint are taken again, at most."""
    disturb, lost = DISTURBANCES[name]
    job, folder = submit_by_submitit(command, data, tmp_path), tmp_path / "run"
    if disturb is not None:
        wait_for_step(10, folder)
        disturb(slurm, job, tmp_path)
    found = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=240)
    assert found["JobState"] == "COMPLETED", (found, told(folder))
    assert (int(found["Restarts"]) >= 1) == (disturb is not None), found
    equal(folder, whole)
    assert repeated(folder) <= lost


@pytest.mark.nightly
def test_a_cancelled_job_of_submitit(
    slurm: Slurm, command: Callable[..., str], data: Path, whole: Path, tmp_path: Path
) -> None:
    job, folder = submit_by_submitit(command, data, tmp_path), tmp_path / "run"
    wait_for_step(10, folder)
    slurm.run("scancel", job)
    assert slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING")["JobState"] == "CANCELLED", told(folder)
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED", "nothing starts it again"
    again = submit_by_submitit(command, data, tmp_path)
    assert slurm.wait(again, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", told(folder)
    equal(folder, whole)
    assert repeated(folder) == 0

"""launch/pretrain.py with python, child processes, torchrun, deepspeed and the variables of srun."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from ijepa_scale import environment
from tests.distributed.commands import ZERO3, finish, losses, start, write_config, write_data

FEW = ("schedule.stop_after=3", "evaluate.every=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder / "run.yaml", data, folder / "run")
    log = finish(start(config, *FEW), config)
    assert "done: 3 steps" in log
    return losses(folder / "run")


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        abs(a - b) < 1e-5 for step in found for a, b in zip(found[step], expected[step], strict=True)
    )


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DEEPSPEED = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2")
LAUNCHES = {
    "processes": ((), ("--processes", "2")),
    "devices": ((), ("--devices", "cpu", "cpu")),
    "torchrun fsdp2": (TORCHRUN, ("engine.strategy=fsdp2",)),
    "deepspeed zero3": (DEEPSPEED, ZERO3),
}


@pytest.mark.parametrize(
    "name", [n if n == "deepspeed zero3" else pytest.param(n, marks=pytest.mark.long) for n in LAUNCHES]
)
def test_launchers_train_the_same(name: str, data: Path, expected: dict, tmp_path: Path) -> None:
    launcher, arguments = LAUNCHES[name]
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    finish(start(config, *arguments, *FEW, launcher=launcher), config)
    assert same(losses(tmp_path / "run"), expected)


def test_srun_variables_start_the_same(data: Path, expected: dict, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    job = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0",
        "MASTER_PORT": str(environment.free_port()),
    }  # fmt: skip
    tasks = [
        start(config, *FEW, **job, SLURM_PROCID=str(task), SLURM_LOCALID=str(task))
        for task in range(2)
    ]  # fmt: skip
    for task in tasks:
        finish(task, config)
    assert same(losses(tmp_path / "run"), expected)


BAD = {
    "batch": (
        ("data.batch_size=9", "engine.accumulation=2"),
        "batch 9 is not divisible by 1 process x accumulation 2",
    ),
    "masks": (("masks.min_keep=60",), "min_keep"),
    "device": (("--devices", "gpu:0"), "device 'gpu:0' is unknown; give cpu, cuda or cuda:N"),
    "no such GPU": (("--devices", "cuda:64"), "needs cuda:64 but "),
    "two counts": (("--processes", "3", "--devices", "cpu"), "--processes is 3 but --devices names 1"),
    "one GPU twice": (("--devices", "cuda:0", "cuda:0"), "--devices names cuda:0 twice"),
    "no steps": (("schedule.stop_after=0",), "the run has 0 steps"),
    "plain on two": (("--processes", "2", "engine.strategy=plain"), "engine.strategy is plain but 2 processes"),
}
FAST = ("masks", "no such GPU", "plain on two")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.long) for n in BAD])
def test_bad_input_gives_one_message_and_code_2(name: str, data: Path, tmp_path: Path) -> None:
    arguments, text = BAD[name]
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    log = finish(start(config, *arguments), config, code=2)
    assert text in log and "Traceback" not in log


@pytest.mark.long
def test_resume_none_and_another_run_are_refused(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    finish(start(config, *FEW), config)
    log = finish(start(config, *FEW, "resume=none"), config, code=2)
    assert "resume is none but" in log and "step-00000003 exists" in log
    changes = {
        "seed=1": "seed was 0, is 1",
        "augment.flip=0.25": "augment.flip was 0.5, is 0.25",
        "model.predictor_width=12": "model.predictor_width was",
        "masks.allow_overlap=true": "masks.allow_overlap was False, is True",
        "objective.beta=2.0": "objective.beta was 1.0, is 2.0",
    }
    log = finish(start(config, *FEW, *changes), config, code=2)
    assert [said for said in changes.values() if said not in log] == []
    log = finish(start(config, *FEW), config)
    assert "done: 3 steps, no steps were left" in log
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000009")
    log = finish(start(config, f"resume={run}/checkpoints/step-00000003"), config, code=2)
    assert "step-00000009 in the same folder is newer" in log
    shutil.rmtree(run / "checkpoints")
    log = finish(start(config, *FEW), config)
    assert "renamed it to metrics-1.jsonl" in log and (run / "metrics-1.jsonl").exists()


def test_divergence_exits_with_code_2_and_saves_the_state_before(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, tmp_path / "run")
    rates = ("optimizer.start_lr=1e30", "optimizer.lr=1e30", "evaluate.every=0")
    log = finish(start(config, "--processes", "2", *rates), config, code=2)
    bad = int(re.search(r"error \(process 0\): step (\d+): ", log)[1])
    assert f"step {bad}: process 0 has loss nan, process 1 has loss nan" in log and "Traceback" not in log
    assert sorted(losses(tmp_path / "run")) == list(range(1, bad + 1))
    assert [p.name for p in (tmp_path / "run" / "stopped").iterdir()] == [f"step-{bad:08d}"]
    log = finish(
        start(config, "schedule.stop_after=3", "evaluate.every=0"), config
    )  # must not start from the diverged state
    assert "done: 3 steps" in log and "resumed" not in log

"""A start in which the processes differ, or one doesn't come, ends in time with one line that names it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from ijepa_scale import environment
from tests.distributed.commands import PRETRAIN, ROOT, STARTED, clean_environment, losses, write_config, write_data


def start(
    folder: Path, rank: int, size: int, port: int, *settings: str, script: Path = PRETRAIN, **variables: str
) -> subprocess.Popen:
    """Starts a process as a launcher would, with its output in a file of its own."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environ = clean_environment(**{**{name: str(value) for name, value in place.items()}, **variables})
    with (folder / f"{rank}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), "--config", str(folder / "run.yaml"), *settings],
            env=environ, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    STARTED.append(process)
    return process


def ended(folder: Path, *processes: subprocess.Popen) -> list[str]:
    """Returns the lines about errors, after all processes have ended with code 2 and without a traceback."""
    codes = [process.wait(timeout=100) for process in processes]
    text = "".join(path.read_text() for path in sorted(folder.glob("?.log")))
    assert set(codes) == {2}, f"{codes}:\n{text}"
    assert "Traceback" not in text
    return [line for line in text.splitlines() if "error (process" in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path / "run.yaml", write_data(tmp_path / "data"), tmp_path / "run")
    return tmp_path


OTHER = {
    "learning rate": (("optimizer.lr=2e-3",), {}, "optimizer.lr is 0.001 on process 0"),
    "seed": (("seed=7",), {}, "seed is 0 on process 0"),
    "batch": (("data.batch_size=16",), {}, "data.batch_size is 8 on process 0"),
    "network": (("model.depth=3",), {}, "model.depth is 2 on process 0"),
    "precision": (("engine.precision=bf16",), {}, "engine.precision is 'fp32' on process 0"),
    "number of processes": ((), {"WORLD_SIZE": "3"}, "the number of processes is 2 on process 0"),
    "run folder": (("folder={}/elsewhere",), {}, "can't see in folder"),
    "images": (("data.train={}/fewer",), {}, "what is in data.train is 50 images"),
    "images of the evaluation": (("evaluate.train={}/fewer",), {}, "what is in evaluate.train is 50 images"),
    "ds_config": (
        ("engine.strategy=deepspeed", "engine.ds_config={}/other.json"), {}, "what engine.ds_config names is a file of",
    ),
    "plug-in": (("--plugin", "own_plugin"), {"PYTHONPATH": "{}:."}, "the plug-in own_plugin is absent on process 0"),
    "a file of the package": ((), {"PYTHONPATH": "{}/edited"}, "the file ijepa_scale/rng.py is"),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["learning rate", *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHER if kind != "learning rate")],
)
def test_processes_that_differ_are_refused(kind: str, folder: Path) -> None:
    settings, variables, told = OTHER[kind]
    first: tuple[str, ...] = ("optimizer.lr=1e-3",)
    script = PRETRAIN
    if kind.startswith("images"):
        write_fewer(folder)
    elif kind == "ds_config":
        first += ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero2.json")
        (folder / "other.json").write_text((ROOT / "ds_configs" / "zero1.json").read_text())
    elif kind == "plug-in":
        (folder / "own_plugin.py").write_text("")
    elif kind == "a file of the package":
        shutil.copytree(ROOT / "ijepa_scale", folder / "edited" / "ijepa_scale")
        script = shutil.copy(PRETRAIN, folder / "edited")
        edited = folder / "edited" / "ijepa_scale" / "rng.py"
        edited.write_text(edited.read_text() + "# edited\n")
    port = environment.free_port()
    ours = [setting.format(folder) for setting in settings]
    changed = {name: value.format(folder) for name, value in variables.items()}
    other = start(folder, 1, 2, port, *first, *ours, script=Path(script), **changed)
    (line,) = ended(folder, start(folder, 0, 2, port, *first), other)
    assert told in line and "process 1" in line
    assert not losses(folder / "run")


def write_fewer(folder: Path) -> None:
    shutil.copytree(folder / "data", folder / "fewer")
    for path in folder.glob("fewer/*2.tar*"):
        path.unlink()
    (folder / "fewer" / "manifest.json").unlink()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["one is missing", "no process 0", "unknown address", "port in use"])
def test_a_start_that_cannot_succeed_ends_in_time(kind: str, folder: Path) -> None:
    port, in_time = environment.free_port(), "engine.start_timeout=6"
    if kind == "one is missing":
        lines = ended(folder, *(start(folder, rank, 3, port, in_time) for rank in (0, 2)))
        assert len(lines) == 1 and "1 of 3 processes haven't come within 6 s: process 1; read" in lines[0]
    elif kind == "no process 0":
        (line,) = ended(folder, start(folder, 1, 2, port, in_time))
        assert f"can't reach process 0 at 127.0.0.1:{port} (connection refused) within" in line
    elif kind == "unknown address":
        (line,) = ended(folder, start(folder, 1, 2, port, in_time, MASTER_ADDR="no.such.host.invalid"))
        assert "no.such.host.invalid" in line and "this host doesn't know that name" in line
    else:
        first = start(folder, 0, 2, port, "engine.start_timeout=60")
        while "waiting for process 1 of 2" not in (folder / "0.log").read_text():
            assert first.poll() is None
        second = start(folder, 0, 2, port, f"folder={folder}/second")
        assert second.wait(timeout=100) == 2
        assert f"error (process 0): process 0 can't listen on port {port}" in (folder / "0.log").read_text()
        first.kill()


@pytest.mark.long
def test_a_process_0_that_is_stopped_ends_the_others(folder: Path) -> None:
    port, in_time = environment.free_port(), "engine.start_timeout=20"
    first, second = (start(folder, rank, 3, port, in_time) for rank in (0, 1))
    try:
        while "waiting for process 2 of 3" not in (folder / "0.log").read_text():
            assert first.poll() is None
            time.sleep(0.1)
        first.send_signal(signal.SIGSTOP)
        (line,) = ended(folder, second)
        assert f"error (process 1): process 0 at 127.0.0.1:{port} doesn't answer process 1 ({second.pid} on" in line
    finally:
        first.kill()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")
def test_mpirun_trains_as_two_processes(folder: Path) -> None:
    launcher = ["mpirun", *(["--allow-run-as-root"] if os.getuid() == 0 else []), "--oversubscribe", "-n", "2"]
    done = subprocess.run(
        [*launcher, sys.executable, str(PRETRAIN), "--config", str(folder / "run.yaml")],
        env=clean_environment(), cwd=folder, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    described: Mapping[str, object] = json.loads((folder / "run" / "run.json").read_text())
    assert described["launcher"] == "mpirun" and len(described["members"]) == 2  # type: ignore[arg-type]
    assert sorted(losses(folder / "run")) == list(range(1, 21))

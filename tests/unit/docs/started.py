"""Starts commands as a shell would: launch scripts in forks of a process that has imported the package, which saves
seconds for each, and launchers in processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pages import ROOT

from ijepa_scale import environment
from ijepa_scale.checkpoint import published_files

PRELOADED = (
    "ijepa_scale.train.pretrain", "ijepa_scale.train.finetune", "ijepa_scale.evaluate.offline",
    "ijepa_scale.evaluate.predictions", "ijepa_scale.visualize.report_page", "ijepa_scale.doctor.examination",
    "ijepa_scale.checkpoint.export", "matplotlib.backends.backend_agg", "torch._dynamo",
)  # fmt: skip
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher's
TIMEOUT_S = 240
TINY_PUBLISHED = {"width": 192, "depth": 12}  # an architecture that is known by its sizes, and so are its heads


class Ended(NamedTuple):
    """How a command ended, and what it has printed to both streams."""

    code: int | None  # None: it didn't end in time and was killed
    text: str


class Starter:
    """Runs launch scripts, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(
        self, script: str, words: list[str], folder: Path, *, variables: Mapping[str, str], through_ijepa: bool = False
    ) -> Ended:
        """Runs a script of launch/ in a folder, with these arguments and variables, in a process of its own."""
        log = folder.with_suffix(".log")
        request = {"script": script, "words": words, "folder": str(folder), "log": str(log)}
        request |= {"variables": dict(variables), "through_ijepa": through_ijepa}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(json.loads(self._process.stdout.readline()), log.read_text(errors="replace"))


@contextlib.contextmanager
def starter() -> Iterator[Starter]:
    """Yields a starter, and ends its process."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, env=inherited(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Starter(process)
        assert process.stdin is not None
        process.stdin.close()


def inherited() -> dict[str, str]:
    variables = environment.child_environment(OMP_NUM_THREADS="1")
    return {name: value for name, value in variables.items() if name not in NOT_INHERITED}


def launch(words: list[str], folder: Path, *, variables: Mapping[str, str], port: int) -> Ended:
    """Runs a command whose first word is a launcher, on this port where the command names none."""
    launcher, *rest = words
    if launcher == "torchrun" and "--rdzv-backend" not in rest and "--master-port" not in rest:
        rest = ["--master-port", str(port), *rest]
    if launcher == "deepspeed":
        cpus = [] if "--hostfile" in rest else ["--num_gpus", "2"]  # else it counts GPUs
        rest = [*cpus, *([] if "--master_port" in rest else ["--master_port", str(port)]), *rest]
    shell = inherited()
    shell["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{shell['PATH']}"
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [launcher, *rest], cwd=folder, env={**shell, **as_root, **variables}, stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    return Ended(code, log.read_text(errors="replace"))


def _serve() -> None:
    """Forks for each request of standard input, and answers with the exit code. A fork returns from here."""
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(**request)
            return
        end = time.monotonic() + TIMEOUT_S
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else None
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        print(json.dumps(code), flush=True)


def _run(script: str, words: list[str], folder: str, log: str, variables: dict[str, str], through_ijepa: bool) -> None:
    os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, stream)
    os.environ.update(variables)
    sys.path[1:1] = [part for part in variables.get("PYTHONPATH", "").split(os.pathsep) if part]
    name = "in1k_vith14_ep300"
    known: dict[str, Any] = {"file": published_files.FILES[name].file, "patch_size": 14, **TINY_PUBLISHED}
    published_files.FILES[name] = published_files.PublishedFile(**known)
    if through_ijepa:
        from ijepa_scale import commands

        sys.argv = ["ijepa", script, *words]
        sys.exit(commands.main())
    path = str(ROOT / "launch" / f"{script}.py")
    sys.argv = [path, *words]
    sys.path[0] = str(Path(path).parent)  # as Python does
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    _serve()

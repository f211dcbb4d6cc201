"""Starts launch scripts as a shell would, in processes that fork from one that has imported the package."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pages import ROOT

from ijepa_scale import environment
from ijepa_scale.checkpoint import published_files

PRELOADED = (
    "ijepa_scale.train.pretrain", "ijepa_scale.train.finetune", "ijepa_scale.evaluate.offline",
    "ijepa_scale.evaluate.predictions", "ijepa_scale.visualize.report_page", "ijepa_scale.doctor.examination",
    "ijepa_scale.checkpoint.export", "matplotlib.backends.backend_agg", "torch._dynamo", "started",
)  # fmt: skip
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher's


class Ended(NamedTuple):
    """How a command ended, and what it has printed to both streams."""

    code: int | None  # None: it didn't end in time and was killed
    text: str


def start(
    script: str, words: list[str], folder: Path, *, through_ijepa: bool = False, variables: Mapping[str, str],
    timeout_s: float,
) -> Ended:  # fmt: skip
    """Runs a script of launch/ in a folder, with these arguments and variables, in a process of its own."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    log = folder.with_suffix(".log")
    process = context.Process(target=_run, args=(script, words, str(folder), str(log), through_ijepa, dict(variables)))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Ended(None, log.read_text(errors="replace"))
    return Ended(process.exitcode, log.read_text(errors="replace"))


def launch(words: list[str], folder: Path, *, variables: Mapping[str, str], port: int, timeout_s: float) -> Ended:
    """Runs a command whose first word is a launcher, on this port where the command names none."""
    launcher, *rest = words
    if launcher == "torchrun" and "--rdzv-backend" not in rest and "--master-port" not in rest:
        rest = ["--master-port", str(port), *rest]
    if launcher == "deepspeed":
        cpus = [] if "--hostfile" in rest else ["--num_gpus", "2"]  # else it counts GPUs
        rest = [*cpus, *([] if "--master_port" in rest else ["--master_port", str(port)]), *rest]
    inherited = {name: value for name, value in environment.child_environment().items() if name not in NOT_INHERITED}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [launcher, *rest], cwd=folder, env={**inherited, **as_root, **variables}, stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    return Ended(code, log.read_text(errors="replace"))


def _run(script: str, words: list[str], folder: str, log: str, through_ijepa: bool, variables: dict[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in NOT_INHERITED:
        os.environ.pop(name, None)
    os.environ.update(variables)
    sys.path[1:1] = variables.get("PYTHONPATH", "").split(os.pathsep)
    known = published_files.FILES["in1k_vith14_ep300"]
    published_files.FILES["in1k_vith14_ep300"] = published_files.PublishedFile(
        file=known.file, width=TINY_PUBLISHED["width"], depth=TINY_PUBLISHED["depth"], patch_size=known.patch_size
    )
    if through_ijepa:
        from ijepa_scale import commands

        sys.argv = ["ijepa", script, *words]
        sys.exit(commands.main())
    path = str(ROOT / "launch" / f"{script}.py")
    sys.argv = [path, *words]
    sys.path[0] = str(Path(path).parent)  # as Python does
    runpy.run_path(path, run_name="__main__")


TINY_PUBLISHED = {"width": 192, "depth": 12}  # an architecture that is known by its sizes, and so are its heads

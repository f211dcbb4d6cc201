"""The same tiny run on one host and on two, by every launcher, with one configuration file and one log per host."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ijepa_scale import environment
from tests.cluster.hosts import Host, TwoHosts
from tests.distributed.commands import ROOT, finish, losses, start, write_config

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1")
PORT = "29511"  # of the hosts' own, so that no other run is in the way
QUICK = ("evaluate.every=0", "health.every=0", "health.keep_best=none")
SLOW_STEPS = """
import time
from ijepa_scale.train.pretrain import PretrainTask
take = PretrainTask.step
def step(task, batch):
    time.sleep({seconds})
    return take(task, batch)
PretrainTask.step = step
"""


def configs(folder: Path, data: Path) -> list[Path]:
    """Returns a configuration file for each host, of one run in `folder`/run."""
    return [write_config(folder / f"node{letter}.yaml", data, folder / "run") for letter in "ab"]


def static(hosts: TwoHosts) -> list[tuple[str, ...]]:
    where = ("--nnodes", "2", "--master-addr", hosts.a.name, "--master-port", PORT)
    return [(*host.prefix, *TORCHRUN, *where, "--node-rank", str(rank)) for rank, host in enumerate(hosts)]


def c10d(hosts: TwoHosts, *options: str, nodes: str = "2") -> list[tuple[str, ...]]:
    meet = ("--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.a.name}:{PORT}", "--rdzv-id", "1")
    return [(*host.prefix, *TORCHRUN, *meet, *options) for host in hosts]


def deepspeed(hosts: TwoHosts, folder: Path, *, ssh: bool) -> list[tuple[str, ...]]:
    """Returns the command of each host; with `ssh`, the first host starts both."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    where = (
        str(Path(sys.executable).parent / "deepspeed"),
        "--hostfile",
        str(hostfile),
        "--master_addr",
        hosts.a.name,
        "--master_port",
        PORT,
    )
    if not ssh:
        return [(*host.prefix, *where, "--no_ssh", "--node_rank", str(rank)) for rank, host in enumerate(hosts)]
    # pdsh passes on variables of Python alone; the others come from this file
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    return [(*hosts.a.prefix, *where)]


def mpirun(first: Host, *, on: tuple[Host, ...] = ()) -> tuple[str, ...]:
    """Returns Open MPI's command for two processes on one host, or one on each of two."""
    where = ("--host", ",".join(f"{host.name}:1" for host in on)) if on else ("--oversubscribe",)
    passed = ("-x", f"MASTER_ADDR={first.name}", "-x", "OMP_NUM_THREADS", "-x", "PYTHONPATH") if on else ()
    return (*first.prefix, "mpirun", "--allow-run-as-root", "-n", "2", *where, *passed, sys.executable)


def begin(launches: list[tuple[str, ...]], files: list[Path], *arguments: str) -> list[subprocess.Popen]:
    """Starts a run on every host that has a command of its own."""
    python = f"{files[0].parent}:{environment.child_environment().get('PYTHONPATH', ROOT)}"
    return [
        start(c, *arguments, launcher=launch, PYTHONPATH=python) for launch, c in zip(launches, files, strict=False)
    ]


def train(launches: list[tuple[str, ...]], files: list[Path], *arguments: str) -> dict[int, tuple[float, float]]:
    """Runs to the end on every host, and returns the losses and gradient norms by step."""
    started = begin(launches, files, *arguments)
    for process, config in zip(started, files, strict=False):
        finish(process, config, timeout=120)
    return losses(files[0].parent / "run")


def difference(found: dict[int, tuple[float, float]], expected: dict[int, tuple[float, float]]) -> float:
    """Returns the largest difference of losses of two runs with the same steps."""
    assert found.keys() == expected.keys()
    return max(abs(found[step][0] - expected[step][0]) for step in found)


def wait_for(true: Callable[[], bool], started: list[subprocess.Popen], files: list[Path], seconds: float = 90) -> None:
    """Waits until something is true of a run that goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not true():
        ended = [process.returncode for process in started if process.poll() is not None]
        logs = "\n".join(path.with_suffix(".log").read_text()[-3000:] for path in files)
        assert not ended and time.monotonic() < deadline, f"{ended}\n{logs}"
        time.sleep(0.05)

"""Reads from a launcher's variables which process of a run this is. Knows nothing of the package but its errors."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ijepa_scale.errors import ConfigError
from ijepa_scale.plurals import counted

_PORT = 29_500  # torchrun's own
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below Linux's ports for outgoing connections, which begin at 32768
_NUMBERED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The rank of this process among the processes of the run, and how they were launched."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str | None = None  # of process 0; None if this is the only process
    port: int | None = None
    launcher: str = "python"  # python | torchrun | torchrun or deepspeed | environment | srun | mpirun
    store_is_there: bool = False  # the launcher serves the store; otherwise process 0 does


def detect(env: Mapping[str, str], *, starts_others: bool = False) -> Launch:
    """Returns this process's rank and world, from the variables `env`.

    torchrun's and DeepSpeed's variables go before those of MPI, and these before Slurm's, since each may run inside the
    next. Kubernetes sets torchrun's without LOCAL_RANK: then each process is taken for the only one of its pod. Without
    any, the process is the only one. `starts_others` says that it starts the run's processes itself.

    Raises:
        ConfigError: a launcher's variables are incomplete or don't fit together; or a Slurm job has several tasks, but
            this process is none of them.
    """
    try:
        launch = _detect(env, starts_others)
    except ValueError as error:  # raised by int()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"a launcher's variable isn't an integer ({error}); check RANK, WORLD_SIZE and SLURM_*"
        ) from error
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            f"rank {launch.rank} is outside the {counted(launch.world_size, 'process')}; check the launcher"
        )
    if launch.port is not None and not 0 < launch.port < 65_536:
        raise ConfigError(f"MASTER_PORT is {launch.port}; give one from 1 to 65535")
    if not 0 <= launch.local_rank < launch.local_world_size:
        raise ConfigError(
            f"local rank {launch.local_rank} is outside the "
            f"{counted(launch.local_world_size, 'process')} of this host; check "
            "LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    return launch


def _detect(env: Mapping[str, str], starts_others: bool) -> Launch:
    for read in (_from_torchrun, _from_open_mpi, _from_slurm, _from_pmi):
        launch = read(env)
        if launch is not None:
            return launch
    if "PMIX_RANK" in env:
        raise ConfigError(
            f"PMIX_RANK is {env['PMIX_RANK']} but nothing tells how many processes there are; start with torchrun, "
            "srun or Open MPI's mpirun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    tasks = int(env.get("SLURM_NTASKS") or 1)
    if tasks > 1 and not starts_others:
        raise ConfigError(
            f"this Slurm job has {tasks} tasks but this process is none of them; start it with srun, torchrun or "
            "deepspeed, or give --processes 1 to run one process"
        )
    return Launch()


def _from_torchrun(env: Mapping[str, str]) -> Launch | None:
    """Source: "Environment variables" in the manual of torchrun; Kubeflow's PyTorchJob sets the four of `_NUMBERED`."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    missing = [name for name in _NUMBERED if name not in env]
    if missing:
        raise ConfigError(
            f"RANK or WORLD_SIZE is set but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
            "start with torchrun or deepspeed, or unset RANK and WORLD_SIZE to run one process"
        )
    world_size = int(env["WORLD_SIZE"])
    is_numbered = "LOCAL_RANK" in env
    return Launch(
        rank=int(env["RANK"]),
        world_size=world_size,
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world_size if is_numbered else 1))),
        address=env["MASTER_ADDR"],
        port=int(env["MASTER_PORT"]),
        launcher=("torchrun" if _is_elastic(env) else "torchrun or deepspeed") if is_numbered else "environment",
        store_is_there=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _is_elastic(env: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in env


def _from_open_mpi(env: Mapping[str, str]) -> Launch | None:
    """Source: "Environment variables" of Open MPI's FAQ on running jobs."""
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return None
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    local = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")), int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    return _of_mpi(env, int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"]), local, job)


def _from_pmi(env: Mapping[str, str]) -> Launch | None:
    """Source: the process manager Hydra, of MPICH and Intel MPI, sets these."""
    if "PMI_RANK" not in env or "PMI_SIZE" not in env:
        return None
    rank, size = int(env["PMI_RANK"]), int(env["PMI_SIZE"])
    alone = (rank, size) if not env.get("MASTER_ADDR") else (0, 1)  # without an address all are on this host
    local = int(env.get("MPI_LOCALRANKID", alone[0])), int(env.get("MPI_LOCALNRANKS", alone[1]))
    return _of_mpi(env, rank, size, local, None)


def _of_mpi(env: Mapping[str, str], rank: int, size: int, local: tuple[int, int], job: str | None) -> Launch:
    """Returns a process of `mpirun`, which tells nothing of where process 0 is, so on several hosts the user does."""
    if size == 1:
        return Launch(launcher="mpirun")
    if local[1] < size and not env.get("MASTER_ADDR"):
        raise ConfigError(
            f"mpirun started {counted(size, 'process')} on several hosts but MASTER_ADDR isn't set; "
            f"give it the host of process "
            "0, e.g. mpirun -x MASTER_ADDR=node1"
        )
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=local[0],
        local_world_size=local[1],
        address=env.get("MASTER_ADDR") or "127.0.0.1",
        port=int(env.get("MASTER_PORT") or (_port_of(job) if job else _PORT)),
        launcher="mpirun",
    )


def _port_of(job: str) -> int:
    """Returns a port that is the same for all processes of a job without communication, and differs between jobs."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS


def _from_slurm(env: Mapping[str, str]) -> Launch | None:
    """Returns the rank and world that srun set for this task; None if it is the only one, or another's.

    Source: the srun manual, "Output environment variables".
    """
    step = env.get("SLURM_STEP_ID")
    size = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if step is None or "SLURM_PROCID" not in env or int(env.get("PMI_SIZE", size)) != size:
        return None  # Intel's mpirun starts its own servers with srun, which hand on that step's variables
    if size == 1:
        return Launch(launcher="srun")
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost"))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
    return Launch(
        rank=int(env["SLURM_PROCID"]),
        world_size=size,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_world_size=_tasks_on_node(tasks, int(env.get("SLURM_NODEID", "0"))),
        address=env.get("MASTER_ADDR") or first_host(nodes),
        port=int(env.get("MASTER_PORT") or _port_of(f"{env.get('SLURM_JOB_ID', '0')}.{step}")),
        launcher="srun",
    )


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Returns the number of tasks on one node from Slurm's notation, e.g. '8(x2),4'."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE is {tasks_per_node!r}; expected a form like 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)]


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list such as 'gpu[003-007,011],login1'."""
    match = re.match(r"(?:\[[^\]]*\]|[^,\[\]])+", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_JOB_NODELIST is {nodelist!r}; expected a form like gpu[003-007]; set MASTER_ADDR")
    return re.sub(r"\[([^\]]*)\]", lambda numbers: re.split(r"[-,]", numbers[1])[0], match[0])

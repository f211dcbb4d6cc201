"""Checks what this host gives a process: /dev/shm, open files, locked memory, memory and cores. Reads system files."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ijepa_scale.doctor.finding import Finding, size_text
from ijepa_scale.host_memory import host_bytes, system_file
from ijepa_scale.plurals import counted

# NCCL keeps the buffers between GPUs of one host in /dev/shm, and containers have 64 MB by default.
# Source: NVIDIA's NCCL user guide, "Troubleshooting", shared memory.
SHARED_BYTES_PER_PROCESS = 128 * 2**20
OPEN_FILES = 1024  # Linux's usual soft limit; a process has shards, workers and sockets open
MEMORY_PER_PROCESS = 2e9  # a process with PyTorch, DeepSpeed and two workers takes about 1 GB before it trains


def shared_memory(processes: int, folder: str = "/dev/shm") -> Iterator[Finding]:
    """Yields whether /dev/shm has room for so many processes on this host."""
    state = os.statvfs(folder)
    size, free = state.f_frsize * state.f_blocks, state.f_frsize * state.f_bavail
    needed = SHARED_BYTES_PER_PROCESS * processes
    wrong = free < needed
    yield Finding(
        check="/dev/shm",
        found=f"{size_text(free)} free of {size_text(size)}, {size_text(needed)} wanted for "
        f"{counted(processes, 'process')} on this host",
        verdict="wrong" if wrong else "ok",
        remedy="give the container more, as docker's --shm-size=8g, or delete what other programs left there"
        if wrong
        else "",
        values={"bytes": size, "free_bytes": free, "needed_bytes": needed},
    )


def open_files() -> Iterator[Finding]:
    """Yields whether a process may have enough files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wrong = soft != unlimited and soft < OPEN_FILES
    yield Finding(
        check="open files",
        found=f"{_limit(soft)} (at most {_limit(hard)}), {OPEN_FILES} wanted",
        verdict="wrong" if wrong else "ok",
        remedy=f"ulimit -n {OPEN_FILES} before the launch, or raise the limit of the job" if wrong else "",
        values={"soft": soft, "hard": hard},
    )


def locked_memory(root: Path = Path("/")) -> Iterator[Finding]:
    """Yields whether a process may lock memory; InfiniBand needs it, and so do batches on their way to a GPU."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in (root / "sys/class/infiniband").glob("*"))
    wrong = soft != resource.RLIM_INFINITY and bool(adapters)
    what = f"for InfiniBand ({', '.join(adapters)})" if adapters else "no InfiniBand here, which would need it"
    yield Finding(
        check="locked memory",
        found=f"{'unlimited' if soft == resource.RLIM_INFINITY else size_text(soft)}; {what}",
        verdict="wrong" if wrong else "ok",
        remedy="ulimit -l unlimited before the launch (memlock in limits.conf; LimitMEMLOCK of slurmd)"
        if wrong
        else "",
        values={"bytes": None if soft == resource.RLIM_INFINITY else soft, "adapters": adapters},
    )


def memory(processes: int, root: Path = Path("/")) -> Iterator[Finding]:
    """Yields whether the control group and the host leave enough memory for so many processes on this host."""
    room = host_bytes(root)
    needed = MEMORY_PER_PROCESS * processes
    wrong = room < needed
    yield Finding(
        check="memory",
        found=f"{size_text(room)} left within host, control group and ulimit -v, {size_text(needed)} wanted for "
        f"{counted(processes, 'process')} on this host",
        verdict="wrong" if wrong else "ok",
        remedy="give the job more memory (Slurm --mem, docker --memory), or start fewer processes" if wrong else "",
        values={"free_bytes": room, "needed_bytes": needed},
    )


def cores(processes: int, root: Path = Path("/")) -> Iterator[Finding]:
    """Yields whether each process on this host has a core of its own, within affinity and the group's quota."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _quota(root)
    count = min(allowed, quota) if quota is not None else allowed
    wrong = count < processes
    within = f", {quota:g} by the control group's quota" if quota is not None else ""
    yield Finding(
        check="cores",
        found=f"{allowed:g} may be used{within}, for {counted(processes, 'process')} on this host",
        verdict="wrong" if wrong else "ok",
        remedy="give the job more cores (Slurm --cpus-per-task, docker --cpus), or start fewer processes"
        if wrong
        else "",
        values={"cores": count, "processes": processes},
    )


def _quota(root: Path) -> float | None:
    """Returns the cores that this process's control groups allow; None if they don't limit it.

    Source: the Linux kernel's documentation, admin-guide/cgroup-v2, "cpu.max".
    """
    names = [line.rpartition(":")[2] for line in system_file(root / "proc/self/cgroup").splitlines()]
    folders = {parent for name in map(Path, ("/", *names)) for parent in (name, *name.parents)}
    found = []
    for folder in folders:
        words = system_file(root / "sys/fs/cgroup" / folder.relative_to("/") / "cpu.max").split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


__all__ = ["cores", "locked_memory", "memory", "open_files", "shared_memory"]

"""Describes this machine and measures how much memory a process takes."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.parallelize import compile_problem
from ijepa_scale.engine.world import choose_device
from ijepa_scale.environment import Launch
from ijepa_scale.host_memory import host_bytes, system_file
from ijepa_scale.planning.hardware import peak_flops

MARGIN = 0.05  # share of the memory kept free for fragmentation, and for libraries later in a long run


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of a run on this host."""

    kind: str  # cpu | cuda
    name: str
    processes: int
    cores: int  # host cores that this program may use
    memory_bytes: float  # memory of its device that one process may take
    peak_flops: float | None = None  # of all devices together; None if it isn't known
    compile_problem: str | None = None  # why blocks can't be compiled here; None if they can

    @property
    def room(self) -> float:
        """The bytes that a process may take, minus the margin."""
        return (1 - MARGIN) * self.memory_bytes

    def text(self) -> str:
        """Returns the machine in one line."""
        where = "of the host's" if self.kind == "cpu" else "of GPU"
        return (
            f"{self.processes} process{'es' if self.processes > 1 else ''} on {self.name} ({self.kind}, {self.cores} "
            f"host cores), {self.memory_bytes / 1e9:.1f} GB {where} memory for each"
        )


def describe(engine: EngineConfig, devices: list[str] | None, processes: int) -> Machine:
    """Describes the machine for a run of `processes`. Creates a CUDA context on GPUs, so call it in a child process.

    Raises:
        ConfigError: a device doesn't exist.
    """
    chosen = []
    for rank in range(processes):
        launch = Launch(rank=rank, world_size=processes, local_rank=rank, local_world_size=processes)
        chosen.append(choose_device(engine, launch, devices[rank] if devices else None))
    cores = len(os.sched_getaffinity(0))
    if chosen[0].type != "cuda":
        memory = host_bytes() / processes
        return Machine(kind="cpu", name=_processor(), processes=processes, cores=cores, memory_bytes=memory)
    name = torch.cuda.get_device_name(chosen[0])
    peak = peak_flops(name)
    return Machine(
        kind="cuda",
        name=name,
        processes=processes,
        cores=cores,
        memory_bytes=min(torch.cuda.get_device_properties(device).total_memory for device in chosen),
        peak_flops=None if peak is None else peak * processes,
        compile_problem=compile_problem(chosen[0]),
    )


class PeakMemory:
    """Measures the peak memory, in bytes, that this process has taken on its device since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Resets the peak. Without kernel support, on a CPU, it stays the peak since the process started."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> int:
        """Returns the peak. On a GPU, it is that of tensors, plus what CUDA, libraries and other programs hold now."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            others = total - free - torch.cuda.memory_reserved(self._device)
            return int(torch.cuda.max_memory_allocated(self._device) + max(0, others))
        lines = system_file(Path("/proc/self/status")).splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return found[0] if found else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor() -> str:
    """Returns the processor's name."""
    lines = system_file(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

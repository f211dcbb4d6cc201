"""The processes of a run and their communication. Must not know any model."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_scale import environment
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.gpus import gpu_in_machine, why_unusable
from ijepa_scale.engine.meeting import Member
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.plurals import counted

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's rank and device, and collectives that cost nothing in a run of one process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    group: Any = None  # torch's process group; None is the one of the training
    store: Any = None  # torch's store, of which no other start uses this part; None in a run of one process
    members: tuple[Member, ...] = ()  # the processes, in rank order
    launcher: str = "python"

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and manifests."""
        return self.rank == 0

    def apart(self) -> World:
        """Returns the same processes with collectives of their own, on the CPU, for another thread. Communicates."""
        group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group)

    def barrier(self) -> None:
        """Waits for all processes. Let it be a run's last collective.

        A thread of gloo may drop the tensors of any other one while Python shuts down, which aborts the process.
        """
        if self.size > 1:
            dist.barrier(self.group)

    def mean(self, tensor: Tensor) -> Tensor:
        """Replaces `tensor` by its mean over the processes, and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
            tensor /= self.size
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all processes, which have equal shapes, stacked along a new first dimension."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(gathered, tensor.contiguous()[None], group=self.group)
        return gathered

    def any(self, value: bool) -> bool:
        """Returns whether a value is true on some process. Synchronises on a GPU."""
        return value if self.size == 1 else bool(self.gather(torch.tensor(value, device=self.device)).any())

    def gather_objects(self, value: object) -> list[object]:
        """Returns the values of all processes, in rank order, on every process."""
        if self.size == 1:
            return [value]
        gathered: list[object] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def broadcast_object(self, value: object) -> object:
        """Returns rank 0's value on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def choose_device(config: EngineConfig, launch: Launch, device: str | None = None) -> torch.device:
    """Returns the device of this process: `device`, else the one that the config names, else a GPU if there is one.

    Sets up PyTorch's allocator for a GPU, so call it before CUDA allocates.

    Raises:
        ConfigError: the device is unknown, this host has fewer GPUs than processes, or it has a GPU that this PyTorch
            can't use.
    """
    kind = device or config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else _cpu_without_gpu(launch)
    if kind == "cuda":
        # if srun binds a GPU to each task, each task sees a single GPU as cuda:0
        bound = launch.launcher == "srun" and torch.cuda.device_count() == 1
        kind = f"cuda:{0 if bound else launch.local_rank}"
    try:
        chosen = torch.device(kind)
    except RuntimeError as error:
        raise ConfigError(f"device {kind!r} is unknown; give cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ConfigError(f"process {launch.rank} needs {chosen} but {why_unusable()}, or set engine.device=cpu")
        if (chosen.index or 0) >= count:
            raise ConfigError(
                f"process {launch.rank} needs {chosen} but this host has {counted(count, 'GPU')}; "
                f"start at most {counted(count, 'process')} "
                "per host, or set engine.device=cpu"
            )
        environment.export_allocator()
        torch.cuda.set_device(chosen)
    return chosen


def _cpu_without_gpu(launch: Launch) -> str:
    """Returns "cpu" if this machine has no GPU, or if the user hides it, which is logged; refuses it otherwise."""
    gpu = gpu_in_machine()
    if gpu is None:
        return "cpu"
    hidden = environment.hidden_gpus()
    if hidden is None:
        raise ConfigError(
            f"engine.device is auto and this machine has {gpu}, but {why_unusable()}, or set engine.device=cpu to use "
            "the CPU"
        )
    if launch.rank == 0:
        logger.warning("engine.device is auto and %s hides %s: this run uses the CPU", hidden, gpu)
    return "cpu"

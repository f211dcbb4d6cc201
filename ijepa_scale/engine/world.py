"""The processes of a run and what they say to each other. Knows no model."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_scale import environment
from ijepa_scale.config import EngineConfig
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place, its device, and collectives that cost nothing where it is alone."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and manifests."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()

    def mean(self, tensor: Tensor) -> Tensor:
        """Returns the mean of `tensor` over the processes (in place)."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the processes' tensors, equal in shape, along a new first axis."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(gathered, tensor.contiguous()[None])
        return gathered

    def gather_objects(self, value: object) -> list[object]:
        """Returns the processes' values, in rank order, on every process."""
        if self.size == 1:
            return [value]
        gathered: list[object] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: object) -> object:
        """Returns rank 0's value on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def choose_device(config: EngineConfig, launch: Launch, device: str | None = None) -> torch.device:
    """Returns the device of this process: the one given, else a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for that isn't there, or that two processes of a host would share.
    """
    kind = device or config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        # srun with a GPU bound to each task shows each of them one GPU, which is cuda:0
        bound = launch.launcher == "srun" and torch.cuda.device_count() == 1
        kind = f"cuda:{0 if bound else launch.local_rank}"
    try:
        chosen = torch.device(kind)
    except RuntimeError as error:
        raise ConfigError(f"device {kind!r} isn't one; give cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise ConfigError(
                f"process {launch.rank} wants {chosen} but this host has {count} GPUs; start at most {count} processes "
                "a host, or set engine.device=cpu"
            )
        torch.cuda.set_device(chosen)
    return chosen


def start_world(launch: Launch, device: torch.device, *, alone: bool = False) -> World:
    """Returns the world, with the process group made; not for one process that is `alone`, without collectives.

    Communicates: waits until all processes are there.
    """
    if not (alone and launch.world_size == 1) and not dist.is_initialized():
        # DeepSpeed takes the device's number from LOCAL_RANK
        environment.export(launch if device.index is None else replace(launch, local_rank=device.index))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if launch.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
    return World(
        rank=launch.rank,
        size=launch.world_size,
        local_rank=launch.local_rank,
        local_size=launch.local_world_size,
        device=device,
    )


def stop_world() -> None:
    """Takes the process group down, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

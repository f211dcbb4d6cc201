"""Whether a model's states fit, and so which engine to take. Floor 1: formulas, asks no device.

States are weights, gradients, Adam's two moments and the target encoder, all fp32 (bf16 is autocast).
Activations aren't counted: they depend on checkpointing and batch, which the threshold leaves room for.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.planning.parameters import count_parameters

FP32_BYTES = 4
STATES_SHARE = 0.4  # of a device's memory; the rest is for activations, buffers and fragmentation
STRATEGIES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one process's states on its device."""

    weights: float
    gradients: float
    optimizer: float  # Adam's moments, and second fp32 weights where the engine keeps them
    target: float

    @property
    def total(self) -> float:
        """All states together."""
        return self.weights + self.gradients + self.optimizer + self.target


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `engine.strategy: auto` becomes."""

    strategy: str  # plain | ddp | fsdp2
    reason: str  # with the numbers, for the log
    reshard_after_forward: bool = False  # fsdp2
    replicas: int = 1  # fsdp2: groups of processes that each hold everything (HSDP)


def state_bytes(
    model: ModelConfig,
    strategy: str,
    *,
    world: int = 1,
    replicas: int = 1,
    reshard_after_forward: bool = False,
    offload_optimizer: bool = False,
) -> StateBytes:
    """Returns the bytes of one process's states under plain, ddp, fsdp2, zero1, zero2 or zero3.

    FSDP2 shards over world / replicas processes; without resharding the whole weights stay beside the
    shards from forward to backward. ZeRO keeps fp32 masters beside the weights. Offloaded states lie in
    host memory and aren't counted.

    Raises:
        ValueError: another strategy.
    """
    counts = count_parameters(model)
    trained, target = FP32_BYTES * counts.trainable, FP32_BYTES * counts.target
    shards = world // replicas if strategy == "fsdp2" else world
    if strategy in ("plain", "ddp"):
        return StateBytes(weights=trained, gradients=trained, optimizer=2 * trained, target=target)
    if strategy == "fsdp2":
        whole = 0 if reshard_after_forward or shards == 1 else trained
        weights = trained / shards + whole
        return StateBytes(
            weights=weights, gradients=trained / shards, optimizer=2 * trained / shards, target=target / shards
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    stage = int(strategy[-1])
    return StateBytes(
        weights=trained / (shards if stage == 3 else 1),
        gradients=trained / (shards if stage >= 2 else 1),
        optimizer=0.0 if offload_optimizer else 3 * trained / shards,
        target=target / (shards if stage == 3 else 1),
    )


def choose_strategy(
    model: ModelConfig, *, world: int, processes_per_node: int, device: str, device_memory_bytes: float | None
) -> Choice:
    """Returns the fastest engine whose states take at most 40% of a device's memory, and why.

    `device` is "cpu" or "cuda"; `device_memory_bytes` isn't read on the CPU or for one process. Sharding
    stays inside a node where that is enough, so that only gradients cross the network.
    """
    if world == 1:
        return Choice(strategy="plain", reason="one process")
    if device == "cpu":
        return Choice(strategy="ddp", reason=f"{world} processes on CPUs, which share the host's memory")
    if not device_memory_bytes:
        raise ValueError(f"device_memory_bytes is {device_memory_bytes}; give the bytes of one {device} device")
    room = STATES_SHARE * device_memory_bytes
    limit = f"{STATES_SHARE:.0%} of {device_memory_bytes / 1e9:.0f} GB"
    replicated = state_bytes(model, "ddp").total
    if replicated <= room:
        return Choice(strategy="ddp", reason=f"{replicated / 1e9:.1f} GB of replicated states are within {limit}")
    nodes = world // processes_per_node if world % processes_per_node == 0 and processes_per_node > 1 else 1
    for reshard in (False, True):
        for replicas in dict.fromkeys((nodes, 1)):
            sharded = state_bytes(model, "fsdp2", world=world, replicas=replicas, reshard_after_forward=reshard).total
            if sharded <= room or (reshard and replicas == 1):
                verdict = "are within" if sharded <= room else "are the least there is, but over"
                reason = (
                    f"{replicated / 1e9:.1f} GB of replicated states are over {limit}; sharded over "
                    f"{world // replicas} processes, weights {'resharded' if reshard else 'kept'} after forward, "
                    f"{sharded / 1e9:.1f} GB {verdict} it"
                )
                return Choice(strategy="fsdp2", reason=reason, reshard_after_forward=reshard, replicas=replicas)
    raise AssertionError("the last alternative is always taken")

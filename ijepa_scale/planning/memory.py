"""Formulas for the memory that a model's states take under each engine. Queries no device.

States are weights, gradients, Adam's two moments and the target encoder, all in fp32 (bf16 is autocast). Activations,
which depend on checkpointing and the batch, aren't counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.planning.parameters import count_parameters

FP32_BYTES = 4
STRATEGIES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one process's states on its device."""

    weights: float
    gradients: float
    optimizer: float  # Adam's moments, and a second copy of fp32 weights if the engine keeps one
    target: float

    @property
    def total(self) -> float:
        """The bytes of all states together."""
        return self.weights + self.gradients + self.optimizer + self.target


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

    FSDP2 shards over world / replicas processes; without resharding, the whole weights are kept in addition to the
    shards from forward to backward. ZeRO keeps fp32 master copies in addition to the weights. Offloaded states are in
    host memory and aren't counted.

    Raises:
        ValueError: another strategy.
    """
    counts = count_parameters(model)
    return spread_states(
        counts.trainable,
        counts.target,
        strategy,
        world=world,
        replicas=replicas,
        reshard_after_forward=reshard_after_forward,
        offload_optimizer=offload_optimizer,
    )


def spread_states(
    num_trained: int,
    num_target: int,
    strategy: str,
    *,
    world: int = 1,
    replicas: int = 1,
    reshard_after_forward: bool = False,
    offload_optimizer: bool = False,
) -> StateBytes:
    """Returns the bytes of one process's states for the given numbers of parameters; see `state_bytes`.

    `num_target` counts the parameters without gradient and optimiser state: the target's, or frozen ones.

    Raises:
        ValueError: another strategy.
    """
    trained, target = FP32_BYTES * num_trained, FP32_BYTES * num_target
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

"""Formulas for the memory that a model's states take under each engine. Queries no device.

States are weights, gradients, the optimiser's own (Adam's two moments) and the target encoder, all in fp32 (bf16 is
autocast). Activations, which depend on checkpointing and the batch, aren't counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.schema import AdamWConfig, ModelConfig
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.spread import Spread, ZeroBuckets

FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one process's states on its device."""

    weights: float
    gradients: float
    optimizer: float  # its states, and a second copy of fp32 weights if the engine keeps one
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
    optimizer_states: tuple[str, ...] = AdamWConfig.state_names,
) -> StateBytes:
    """Returns the bytes of one process's states under plain, ddp, fsdp2, zero1, zero2 or zero3.

    FSDP2 shards over world / replicas processes; without resharding, the whole weights are kept in addition to the
    shards from forward to backward. ZeRO keeps fp32 master copies in addition to the weights. Offloaded states are in
    host memory and aren't counted. `optimizer_states` are kept for each weight.

    Raises:
        ValueError: another strategy.
    """
    counts = count_parameters(model)
    spread = Spread(
        strategy=strategy,
        world=world,
        replicas=replicas,
        reshard_after_forward=reshard_after_forward,
        optimizer_states=optimizer_states,
        zero=ZeroBuckets(offload_optimizer=offload_optimizer),
    )
    return spread_states(counts.trainable, counts.target, spread)


def spread_states(num_trained: int, num_target: int, spread: Spread) -> StateBytes:
    """Returns the bytes of one process's states for so many parameters; the rest is as in `state_bytes`.

    `num_target` parameters have no gradient and no optimiser state: a target's, or frozen ones.
    """
    trained, target = FP32_BYTES * num_trained, FP32_BYTES * num_target
    states, shards = len(spread.optimizer_states), spread.shards
    if spread.strategy in ("plain", "ddp"):
        return StateBytes(weights=trained, gradients=trained, optimizer=states * trained, target=target)
    if spread.strategy == "fsdp2":
        whole = 0 if spread.reshard_after_forward or shards == 1 else trained
        weights = trained / shards + whole
        return StateBytes(
            weights=weights, gradients=trained / shards, optimizer=states * trained / shards, target=target / shards
        )
    return StateBytes(
        weights=trained / (shards if spread.stage == 3 else 1),
        gradients=trained / (shards if spread.stage >= 2 else 1),
        optimizer=0.0 if spread.zero.offload_optimizer else (states + 1) * trained / shards,
        target=target / (shards if spread.stage == 3 else 1),
    )

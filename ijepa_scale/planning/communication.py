"""Formulas for the bytes that a step sends and for its communication buffers. Communicates with no other process.

In a ring of n processes each sends (n - 1) / n of the bytes for an all-gather or a reduce-scatter, and twice that for
an all-reduce (Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002). Scalars, such as the flag of the finite
check, aren't counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.planning.devices import Cluster
from ijepa_scale.planning.memory import FP32_BYTES
from ijepa_scale.planning.parameters import block_parameters, count_parameters
from ijepa_scale.planning.spread import Spread

LINK_SHARE = 0.8  # share of a link's stated bandwidth that a collective reaches: an assumption, not a measurement


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The data that one process sends in one optimiser step for one purpose."""

    purpose: str
    bytes: float
    processes: int  # in the ring
    per_node: int  # processes of the ring in each node
    behind: str  # the computation that can hide it: forward | backward | last backward | nothing

    def seconds(self, cluster: Cluster) -> float:
        """Returns the time of the transfer on the slowest link of its ring.

        Each process of a node has a network adapter, so a ring that crosses nodes with k processes in each is as
        fast as k adapters together, but never faster than the links inside a node.
        """
        link = cluster.device.link_bandwidth
        if self.processes > self.per_node:
            link = min(link, self.per_node * cluster.network_bandwidth)
        return self.bytes / (LINK_SHARE * link)


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Bytes of one process's communication buffers; they come on top of the states."""

    gathered: float = 0.0  # whole weights, kept from forward to backward
    forward: float = 0.0  # in flight while the trained module runs
    target: float = 0.0  # in flight while the target runs
    backward: float = 0.0  # gradients in flight
    gradients: float = 0.0  # whole gradients kept between micro-batches, if the states count only shards of them
    permanent: float = 0.0

    @property
    def largest(self) -> float:
        """The most bytes allocated at once, not counting `gradients`."""
        return self.permanent + max(self.target, self.gathered + max(self.forward, self.backward))


def transfers(model: ModelConfig, spread: Spread) -> list[Transfer]:
    """Returns what one process sends in one optimiser step, by purpose; an empty list for a single process."""
    counts = count_parameters(model)
    return transfers_of(counts.trainable, counts.target, spread)


def transfers_of(trained: int, target: int, spread: Spread) -> list[Transfer]:
    """Returns the same for so many parameters that are trained, and so many of a target that runs in each step."""
    if spread.world == 1:
        return []
    micro = spread.accumulation
    if spread.strategy == "ddp":
        return [_ring(spread, "all-reduce gradients", 2 * FP32_BYTES * trained, "last backward")]
    if spread.strategy == "fsdp2":
        return _fsdp2(spread, trained, target)
    if spread.stage in (1, 2):
        passes = micro if spread.stage == 2 else 1
        reduce = (2 if spread.zero.all_reduce else 1) * spread.sent_bytes * trained * passes
        behind = "backward" if spread.stage == 2 else "last backward"
        name = "all-reduce gradients" if spread.zero.all_reduce else "reduce gradients"
        return [
            _ring(spread, name, reduce, behind),
            _ring(spread, "all-gather weights", FP32_BYTES * trained, "nothing"),  # happens after the optimiser
        ]
    found = [
        _ring(spread, "gather target", spread.target_sent_bytes * target * micro, "forward"),
        _ring(spread, "gather weights", spread.sent_bytes * trained * micro, "forward"),
        _ring(spread, "reduce-scatter gradients", spread.sent_bytes * trained * micro, "backward"),
    ]
    again = spread.sent_bytes * max(0, trained - spread.zero.held) * micro
    return [*found, _ring(spread, "gather weights again", again, "backward")] if again else found


def _fsdp2(spread: Spread, trained: int, target: int) -> list[Transfer]:
    weight = spread.sent_bytes
    found = []
    if spread.shards > 1:
        found = [
            _ring(spread, "gather target", weight * target * spread.accumulation, "forward"),
            _ring(spread, "gather weights", weight * trained * spread.accumulation, "forward"),
            _ring(spread, "reduce-scatter gradients", FP32_BYTES * trained, "last backward"),
        ]
        if spread.reshard_after_forward:
            found.append(_ring(spread, "gather weights again", weight * trained * spread.accumulation, "backward"))
    if spread.replicas > 1:
        share = 2 * FP32_BYTES * trained / spread.shards * (spread.replicas - 1) / spread.replicas
        per_node = max(1, min(spread.local, spread.world) // spread.shards)
        found.append(
            Transfer(
                purpose="all-reduce shards",
                bytes=share,
                processes=spread.replicas,
                per_node=per_node,
                behind="last backward",
            )
        )
    return found


def _ring(spread: Spread, purpose: str, total: float, behind: str) -> Transfer:
    """Returns a transfer of `total` bytes among the processes that divide one set of states."""
    size = spread.shards
    return Transfer(
        purpose=purpose,
        bytes=total * (size - 1) / size,
        processes=size,
        per_node=min(size, spread.local),
        behind=behind,
    )


def buffers(model: ModelConfig, spread: Spread) -> Buffers:
    """Returns the bytes of one process's buffers. DDP needs none, because its buckets are the gradients themselves.

    FSDP2 has two blocks in flight, each gathered and copied out; in backward also a block's gradients and their fp32
    copy that is reduced. ZeRO allocates full reduce buckets, however small the model is.
    """
    sizes = resolve(model)
    block = max(
        block_parameters(sizes.width, sizes.mlp_width),
        block_parameters(sizes.predictor_width, sizes.predictor_mlp_width),
    )
    return buffers_of(count_parameters(model).trainable, block, spread)


def buffers_of(trained: int, block: int, spread: Spread) -> Buffers:
    """Returns the same for so many trained parameters, and so many in the largest block."""
    if spread.strategy in ("plain", "ddp"):
        return Buffers()
    if spread.strategy == "fsdp2":
        weight = spread.sent_bytes
        if spread.shards == 1 and weight == FP32_BYTES:
            return Buffers()
        flight = 2 * 2 * weight * block
        accumulated = FP32_BYTES * trained if spread.accumulation > 1 else 0.0
        return Buffers(
            gathered=0.0 if spread.reshard_after_forward else weight * trained,
            forward=flight,
            target=flight,
            backward=2 * (weight + FP32_BYTES) * block + (flight if spread.reshard_after_forward else 0.0),
            gradients=accumulated,
        )
    bucket = spread.sent_bytes * spread.zero.reduce
    if spread.stage < 3:
        flat = FP32_BYTES * trained / spread.world  # the optimiser's copy of its shard
        return Buffers(backward=max(bucket * (2 if spread.zero.overlap else 1), flat))
    held = min(trained, spread.zero.held)
    flight = block + min(spread.zero.prefetch, trained)  # weights
    return Buffers(
        gathered=spread.sent_bytes * held,
        forward=0.0 if held == trained else spread.sent_bytes * flight,
        target=spread.target_sent_bytes * flight,
        backward=FP32_BYTES * block,
        permanent=bucket,
    )

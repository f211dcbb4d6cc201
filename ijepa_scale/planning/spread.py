"""Describes how one step is spread over processes, by the numbers that determine memory and communication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ijepa_scale.config.schema import AdamWConfig

STRATEGIES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class ZeroBuckets:
    """The buffer sizes in a DeepSpeed file, in parameters; the defaults are those of `ds_configs/`."""

    reduce: int = 200_000_000
    overlap: bool = True  # two reduce buckets instead of one (stages 1 and 2)
    all_reduce: bool = True  # whole buckets are all-reduced; else each shard is reduced to its owner
    prefetch: int = 50_000_000  # stage 3: gathered ahead
    held: int = 2_000_000_000  # stage 3: at most this many stay gathered from forward to backward
    offload_optimizer: bool = False

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> ZeroBuckets:
        """Returns the sizes in the `zero_optimization` section of a checked DeepSpeed file."""
        offload = zero.get("offload_optimizer") or {}
        live, reuse = (zero.get(f"stage3_max_{name}", cls.held) for name in ("live_parameters", "reuse_distance"))
        return cls(
            reduce=int(zero.get("reduce_bucket_size", cls.reduce)),
            overlap=bool(zero.get("overlap_comm", cls.overlap)),
            all_reduce=bool(zero.get("use_multi_rank_bucket_allreduce", cls.all_reduce)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            held=int(min(live, reuse)),
            offload_optimizer=offload.get("device", "none") != "none",
        )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A strategy, its processes, and the settings that change its memory and communication."""

    strategy: str  # one of STRATEGIES
    world: int = 1
    local: int = 8  # processes per node, at most
    replicas: int = 1  # fsdp2: groups of processes that each hold all states (HSDP)
    reshard_after_forward: bool = False  # fsdp2
    precision: str = "bf16"
    communication: str = "fp32"  # zero with bf16 precision: the dtype of gathers and reductions
    accumulation: int = 1
    optimizer_states: tuple[str, ...] = AdamWConfig.state_names  # fp32, one of each for each weight
    renews_copies: bool = False  # the optimiser does, of the weights; see `OptimizerConfig.renews_copies`
    zero: ZeroBuckets = field(default_factory=ZeroBuckets)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if self.world % self.replicas:
            raise ValueError(f"{self.world} processes don't split into replicas {self.replicas}; choose a divisor")

    @property
    def shards(self) -> int:
        """The number of processes among which sharded states are divided."""
        return self.world // self.replicas

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 for other strategies."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    @property
    def target_replicated(self) -> bool:
        """Whether each process holds the whole target."""
        return self.strategy != "fsdp2" and self.stage != 3

    @property
    def sent_bytes(self) -> int:
        """Bytes per element when a trained weight is gathered, or its gradient reduced by ZeRO."""
        low = self.strategy == "fsdp2" or (self.stage > 0 and self.communication == "bf16")
        return 2 if low and self.precision == "bf16" else 4

    @property
    def target_sent_bytes(self) -> int:
        """Bytes per element when a target weight is gathered; bf16 is safe, because it has no gradient to reduce."""
        return 2 if self.precision == "bf16" and not self.target_replicated else 4

    @property
    def autocast_copies(self) -> bool:
        """Whether autocast makes bf16 copies of fp32 weights; it needn't under FSDP2, which gathers them in bf16."""
        return self.precision == "bf16" and self.strategy != "fsdp2" and not self.renews_copies

    @property
    def lasting_copies(self) -> bool:
        """Whether the trained weights have bf16 copies that last from step to step."""
        return self.precision == "bf16" and self.strategy != "fsdp2" and self.renews_copies

    @property
    def label(self) -> str:
        """The strategy's name in tables."""
        if self.strategy != "fsdp2":
            return self.strategy
        kind = f"hsdp {self.replicas}x{self.shards}" if self.replicas > 1 else "fsdp2"
        return f"{kind} reshard" if self.reshard_after_forward else kind

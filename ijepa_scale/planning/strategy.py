"""Chooses `engine.strategy` and `engine.compile` where they are auto, with the reason. Queries no device."""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.schema import AdamWConfig, EngineConfig, ModelConfig
from ijepa_scale.planning.footprint import target_copy_bytes
from ijepa_scale.planning.memory import state_bytes
from ijepa_scale.planning.spread import Spread

STATES_SHARE = 0.4  # share of a device's memory; the rest is for activations, buffers and fragmentation


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen engine."""

    strategy: str  # plain | ddp | fsdp2
    reason: str  # with the numbers, for the log
    reshard_after_forward: bool = False  # fsdp2
    replicas: int = 1  # fsdp2: groups of processes that each hold all states (HSDP)


def choose_strategy(
    model: ModelConfig,
    *,
    world: int,
    processes_per_node: int,
    device: str,
    device_memory_bytes: float | None,
    precision: str = "bf16",
    optimizer_states: tuple[str, ...] = AdamWConfig.state_names,
) -> Choice:
    """Returns the fastest engine whose states take at most 40% of a device's memory, and the reason.

    `device` is "cpu" or "cuda"; `device_memory_bytes` is ignored on the CPU and for one process. Replicated states
    include the target's bf16 copies if `precision` is bf16, and `optimizer_states` for each weight. If sharding within
    each node is enough, shards don't span nodes, so that only gradients cross the network.
    """
    if world == 1:
        return Choice(strategy="plain", reason="one process")
    if device == "cpu":
        return Choice(strategy="ddp", reason=f"{world} processes on CPUs, which share the host's memory")
    if not device_memory_bytes:
        raise ValueError(f"device_memory_bytes is {device_memory_bytes}; give the bytes of one {device} device")
    room = STATES_SHARE * device_memory_bytes
    limit = f"{STATES_SHARE:.0%} of {device_memory_bytes / 1e9:.0f} GB"
    copies = target_copy_bytes(model, Spread(strategy="ddp", precision=precision))
    replicated = state_bytes(model, "ddp", optimizer_states=optimizer_states).total + copies
    if replicated <= room:
        return Choice(strategy="ddp", reason=f"{replicated / 1e9:.1f} GB of replicated states are within {limit}")
    nodes = world // processes_per_node if world % processes_per_node == 0 and processes_per_node > 1 else 1
    for reshard in (False, True):
        for replicas in dict.fromkeys((nodes, 1)):
            sharded = state_bytes(
                model,
                "fsdp2",
                world=world,
                replicas=replicas,
                reshard_after_forward=reshard,
                optimizer_states=optimizer_states,
            ).total
            if sharded <= room or (reshard and replicas == 1):
                verdict = "are within" if sharded <= room else "are the least possible, but over"
                reason = (
                    f"{replicated / 1e9:.1f} GB of replicated states are over {limit}; sharded over "
                    f"{world // replicas} processes, weights {'resharded' if reshard else 'kept'} after forward, "
                    f"{sharded / 1e9:.1f} GB {verdict} it"
                )
                return Choice(strategy="fsdp2", reason=reason, reshard_after_forward=reshard, replicas=replicas)
    raise AssertionError("the last alternative is always taken")


def resolve_engine(
    engine: EngineConfig,
    model: ModelConfig,
    *,
    world: int,
    processes_per_node: int,
    device: str,
    device_memory_bytes: float | None,
    optimizer_states: tuple[str, ...] = AdamWConfig.state_names,
) -> tuple[EngineConfig, str]:
    """Returns the engine's configuration with `strategy: auto` replaced, and the reason for the log.

    If `ds_config` is set, `auto` becomes DeepSpeed. A configuration that names a strategy is returned unchanged. The
    other arguments are those of `choose_strategy`.
    """
    if engine.strategy != "auto":
        return engine, f"strategy {engine.strategy} as configured"
    if engine.ds_config is not None:
        return engine.replace(strategy="deepspeed"), f"ds_config names {engine.ds_config}"
    choice = choose_strategy(
        model,
        world=world,
        processes_per_node=processes_per_node,
        device=device,
        device_memory_bytes=device_memory_bytes,
        precision=engine.precision,
        optimizer_states=optimizer_states,
    )
    resolved = engine.replace(
        strategy=choice.strategy,
        reshard_after_forward=choice.reshard_after_forward or engine.reshard_after_forward,
        replicas=choice.replicas,
    )
    return resolved, choice.reason


def resolve_compile(engine: EngineConfig, *, device: str, problem: str | None = None) -> tuple[EngineConfig, str]:
    """Returns the engine's configuration with `compile: auto` replaced, and the reason for the log.

    `device` is "cpu" or "cuda". `problem` says why this machine can't compile for its GPU; None if it can. Without
    compilation, `compile_cache` becomes null, since nothing is kept in it.
    """
    if engine.compile != "auto":
        return engine, "as configured"
    if device != "cuda":
        return engine.replace(
            compile=False, compile_cache=None
        ), f"compiled blocks gain nothing on the {device.upper()}"
    if engine.layer_norm == "apex":
        problem = "torch.compile can't trace apex's layer norm"
    if problem is not None:
        return engine.replace(compile=False, compile_cache=None), problem
    return engine.replace(compile=True), "compiled blocks read and write less memory on a GPU"

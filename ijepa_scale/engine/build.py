"""Builds the engine that the config names. Must not know how engines work."""

from __future__ import annotations

from collections.abc import Callable

from ijepa_scale.config import EngineConfig, OptimizerConfig
from ijepa_scale.engine.determinism import make_deterministic
from ijepa_scale.engine.native import DdpEngine, Fsdp2Engine, PlainEngine
from ijepa_scale.engine.parallelize import choose_compile
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.engine.zero import ZeroEngine
from ijepa_scale.errors import ConfigError

_ENGINES: dict[str, Callable[[World, EngineConfig, OptimizerConfig], Engine]] = {
    "plain": PlainEngine,
    "ddp": DdpEngine,
    "fsdp2": Fsdp2Engine,
    "deepspeed": ZeroEngine,
}


def build_engine(world: World, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """Returns the engine of `config.strategy`, in which `auto` must already be resolved.

    Raises:
        ConfigError: `config.triton` names kernels but the device isn't a GPU, `choose_compile`, `make_deterministic` or
            the engine refuses the config.
    """
    if config.triton and world.device.type != "cuda":
        raise ConfigError(
            f"engine.triton names {', '.join(config.triton)} but the device is {world.device.type}; Triton kernels "
            "need CUDA: set engine.triton=[]"
        )
    make_deterministic(config, world.device)
    return _ENGINES[config.strategy](world, choose_compile(config, world.device), optimizer)

"""Compares the plan's prediction of state bytes with the bytes that real engines hold after a step."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.world import World
from ijepa_scale.planning.footprint import target_copy_bytes
from ijepa_scale.planning.memory import state_bytes
from ijepa_scale.planning.spread import Spread
from tests.distributed.harness import run
from tests.distributed.training import MODEL, make, masks_config, part

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


def _bytes(tensors: list[Tensor]) -> int:
    """Returns the bytes of the distinct storages of these tensors on this process."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def states(world: World, strategy: str) -> dict[str, int]:
    """Returns the bytes of this process's states after one step, and the bytes per element that DeepSpeed gathers."""
    zero = strategy.startswith("zero")
    engine = {"strategy": "deepspeed", "ds_config": f"ds_configs/{strategy}.json"} if zero else {"strategy": strategy}
    if strategy == "fsdp2":
        engine["reshard_after_forward"] = True
    built, step = make(world, EngineConfig(**engine, precision="bf16"), AdamWConfig(), masks_config())
    step(part(0, world))
    gc.collect()
    module, target = list(built.module.parameters()), list(built.target_module.parameters())
    if strategy == "zero3":
        module, target = ([p.ds_tensor for p in each] for each in (module, target))
    optimizer = built.zero.optimizer if zero else built.optimizer
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    masters = built._masters() if zero else []
    values = built._local_shards()[0]
    found = {"weights": _bytes(module), "optimizer": _bytes(moments) + _bytes(masters), "target": _bytes(values)}
    found["copies"] = _bytes([*target, *values]) - found["target"]
    if zero:
        from deepspeed.runtime.torch_autocast import get_comm_dtype

        found["gathered"] = max(torch.finfo(get_comm_dtype(p)).bits // 8 for p in built.module.parameters())
    return found


@pytest.mark.parametrize("strategy", ENGINES)
def test_predicted_states_are_those_of_the_engines(strategy: str) -> None:
    predicted = state_bytes(MODEL, strategy, world=2, reshard_after_forward=True)
    copies = target_copy_bytes(MODEL, Spread(strategy=strategy, world=2))
    for found in run(states, 2, strategy):
        for kind in ("weights", "optimizer", "target"):
            assert getattr(predicted, kind) == pytest.approx(found[kind], rel=0.1), kind
        assert found["copies"] == pytest.approx(copies, rel=0.1)
        assert found.get("gathered", 4) == 4  # fp32 under autocast too, as planning.communication assumes

"""Properties of engines that losses don't show: one reduction per step, checkpointing, modes, sharding."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.masks import Masks
from tests.distributed import training
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES, sharded_elements
from tests.distributed.training import BATCH, MODEL, curve, images_of, make, masks_config, part

PLAIN = (1, {"strategy": "plain"})
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
TRAINED, TARGET = 3 + 2, 3  # number of blocks


def an_engine(world: World, engine: dict, **changes: Any) -> tuple[Engine, Any]:
    return make(world, EngineConfig(**engine, precision="fp32", **changes), AdamWConfig(), masks_config())


def inputs(world: World, step: Any) -> tuple[Tensor, Masks]:
    batch = part(0, world)
    return images_of(batch), step.masks(0, batch.position, len(batch), BATCH)[0]


def is_reduced(world: World, built: Any) -> bool:
    """Returns whether the gradients are reduced over all processes."""
    gradients = [p.grad for p in built.module.parameters() if p.grad is not None]
    if not gradients or isinstance(gradients[0], DTensor):
        return bool(gradients)  # FSDP2 stores unreduced gradients elsewhere
    each = world.gather(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.equal(each[0], each[1])


def when_reduced(world: World, engine: dict) -> list[bool]:
    """Returns, after the backward of each micro-batch of two steps, whether the gradients are reduced."""
    built, step = an_engine(world, engine, accumulation=4)
    found = []
    for index in range(2):
        for micro in built.accumulate(part(index, world)):
            masks, _ = step.masks(index, micro.position, len(micro), BATCH)
            built.backward(built.model(images_of(micro), masks).square().mean())
            found.append(is_reduced(world, built))
        built.step(step.schedule(index), index)
    return found


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_gradients_are_reduced_once_per_step(name: str) -> None:
    for found in run(when_reduced, *ENGINES[name]):
        assert found == [False, False, False, True] * 2


def modes(world: World, engine: dict) -> dict[str, Any]:
    """Returns the mode of blocks, whether outputs have gradients, and whether evaluation leaves weights sharded.

    The engine gets a target that is neither frozen nor in evaluation mode.
    """
    training.build_target = lambda jepa: copy.deepcopy(jepa.encoder)
    built, step = an_engine(world, engine)
    module, target = built.module, built.target_module  # type: ignore[attr-defined]
    seen: list[bool] = []
    for root in (module, target):
        for part_ in root.modules():
            part_.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    found: dict[str, Any] = {}
    images, masks = inputs(world, step)
    for name, forward in (("evaluate", built.evaluate), ("target", built.target), ("model", built.model)):
        seen.clear()
        output = forward(images, masks) if name != "target" else forward(images)
        found[name] = set(seen), output.requires_grad
        if name == "evaluate":
            found["training afterwards"] = {part_.training for part_ in module.modules()}
            found["sharded"] = {isinstance(p, DTensor) for p in module.parameters()}
    built.backward(output.square().mean())
    found["frozen"] = {p.requires_grad for p in target.parameters()}
    return found


@pytest.mark.parametrize("name", ["plain", "ddp", "fsdp2", "zero1", "zero3"])
def test_evaluation_restores_modes_and_sharding(name: str) -> None:
    processes, engine = ENGINES.get(name, PLAIN)
    for found in run(modes, processes, engine, alone=name == "plain"):
        assert found == {
            "evaluate": ({False}, False),
            "target": ({False}, False),
            "model": ({True}, True),
            "training afterwards": {True},
            "sharded": {name == "fsdp2"},
            "frozen": {False},
        }


def gathered(world: World, engine: dict) -> tuple[set[bool], set[bool]]:
    """Returns whether trained weights, and the target's weights, are sharded between forward and backward."""
    built, step = an_engine(world, engine)
    images, masks = inputs(world, step)
    built.target(images)
    output = built.model(images, masks)
    roots = built.module, built.target_module  # type: ignore[attr-defined]
    trained, target = ({isinstance(p, DTensor) for p in root.parameters()} for root in roots)
    built.backward(output.square().mean())
    return trained, target


@pytest.mark.parametrize("reshard", [False, True])
def test_fsdp2_frees_weights_after_the_forward_as_configured(reshard: bool) -> None:
    processes, engine = ENGINES["fsdp2"]
    for trained, target in run(gathered, processes, {**engine, "reshard_after_forward": reshard}):
        assert trained == {reshard} and target == {True}


def test_each_replica_holds_all_shards() -> None:
    for local, pieces, full in run(sharded_elements, 2, {"strategy": "fsdp2", "replicas": 2}):
        assert local == pieces == full


def uneven(world: World, engine: dict) -> dict:
    """Returns a short training whose tensors don't divide among 3 processes."""
    training.BATCH = 6
    training.MODEL = MODEL.replace(width=32, heads=2, predictor_width=16)
    return curve(world, {**engine, "precision": "fp32"}, {}, {"group_size": 6}, 4)


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero3"])
def test_shards_of_unequal_length_train_the_same(name: str) -> None:
    expected = run(uneven, 1, {"strategy": "plain"}, alone=True)[0]
    for found in run(uneven, 3, ENGINES[name][1]):
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert found["state"].keys() == expected["state"].keys()
        for tensor, wanted in expected["state"].items():
            torch.testing.assert_close(found["state"][tensor], wanted, atol=1e-5, rtol=0)


def products(world: World, engine: dict) -> tuple[Counter, Counter]:
    """Returns how often the first MLP layer of each trained block, and of each target block, ran in a step."""
    built, step = an_engine(world, engine)
    counts: tuple[Counter, Counter] = Counter(), Counter()
    roots = built.module, built.target_module  # type: ignore[attr-defined]
    for root, counter in zip(roots, counts, strict=True):
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("fc1"):
                module.register_forward_hook(lambda *_, name=name, counter=counter: counter.update([name]))
    step(part(0, world))
    return counts


@pytest.mark.parametrize(
    ("name", "mode"),
    [("plain", "none"), ("plain", "selective"), ("zero3", "selective")]
    + [(name, "full") for name in ("plain", "ddp", "fsdp2", "zero1")],
)
def test_each_trained_block_runs_again_in_backward(name: str, mode: str) -> None:
    processes, engine = ENGINES.get(name, PLAIN)
    for trained, target in run(products, processes, {**engine, "checkpointing": mode}, alone=name == "plain"):
        assert sorted(trained.values()) == [1 if mode == "none" else 2] * TRAINED
        assert sorted(target.values()) == [1] * TARGET


class CountsProducts(TorchDispatchMode):
    def __init__(self) -> None:
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in str(function) for word in ("mm.default", "_linear_pointwise"))
        return function(*args, **(kwargs or {}))


@contextmanager
def counting(counts: dict[str, int], mode: str) -> Iterator[None]:
    with CountsProducts() as counter:
        yield
    counts[mode] = counter.count


def test_selective_checkpointing_repeats_no_matrix_product() -> None:
    counts: dict[str, int] = {}
    for mode in ("none", "selective", "full"):
        built, step = an_engine(ALONE, {"strategy": "plain"}, checkpointing=mode)
        loss = built.model(*inputs(ALONE, step)).square().mean()
        with counting(counts, mode):
            loss.backward()
    assert counts["none"] == counts["selective"]
    assert counts["full"] >= counts["none"] + 3 * TRAINED  # qkv, proj and fc1; fc2's output isn't needed again

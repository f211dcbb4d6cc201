"""A packed batch gives the predictions, loss and gradients of single images with dense attention, in fp32."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ijepa_scale.config import AdamWConfig, EngineConfig, ModelConfig, RegressionConfig
from ijepa_scale.engine import parallelize
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.types import DenseMasks, PackedMasks, Wanted
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.layers import Attention
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.regression import Regression
from ijepa_scale.objectives.targets import normalise_targets, select_targets
from ijepa_scale.optim.groups import clean_name
from tests.distributed import training
from tests.distributed.harness import run
from tests.distributed.training import BATCH, MODEL, images_of, make, masks_config, part

ENGINES = {
    "plain": (1, {"strategy": "plain"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "zero3": (2, {"strategy": "deepspeed", "ds_config": "ds_configs/zero3_small.json"}),
}
# Checkpointing mode and compile backend. Not inductor, which takes a minute per case on the CPU.
VARIANTS = [("none", None), ("none", "eager"), ("full", None), ("full", "aot_eager")]
TOLERANCE = 1e-5
MASKS = masks_config(context="packed")
NUM_PATCHES = MODEL.grid[0] * MODEL.grid[1]

Result = tuple[Tensor, Tensor, dict[str, Tensor]]  # predictions in the packed order, loss, gradients by name


def sharp_jepa(config: ModelConfig, seed: int) -> JEPA:
    """Returns a model with uneven attention. The almost uniform attention of fresh weights would hide errors."""
    module = build_jepa(config, seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Attention):
                part.qkv.weight.mul_(15.0)
                part.proj.weight.mul_(5.0)
    return module


def per_image(world: World) -> Result:
    """Returns the result for this process's images, each computed alone and dense. Gradients are of all images."""
    module = sharp_jepa(MODEL, seed=3).to(world.device)
    target = build_target(module)
    sampler = MaskSampler(MASKS, MODEL.grid, seed=5)
    images = images_of(part(0, dataclasses.replace(world, rank=0, size=1))).to(world.device)  # all processes
    predictions, losses = [], []
    for position in range(BATCH):
        image = images[position : position + 1]
        packed = sampler(0, position, 1, BATCH).map(lambda tensor: tensor.to(world.device))
        assert isinstance(packed, PackedMasks)
        shape = (MASKS.num_target_blocks, 1, -1)
        masks = DenseMasks(packed.context_index.view(1, 1, -1), packed.target_index.view(shape))
        with torch.no_grad():
            features = normalise_targets(target(image))
        prediction = module(image, masks)
        index = packed.target_index.view(MASKS.num_target_blocks, -1)
        losses.append(Regression(RegressionConfig()).compare(prediction, features[0][index], masks))
        if position * world.size // BATCH == world.rank:
            predictions.append(prediction)
    torch.stack(losses).mean().backward()
    by_block = zip(*(prediction.unbind() for prediction in predictions), strict=True)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    mine = torch.stack(losses).view(world.size, -1)[world.rank].mean()
    return torch.cat([row for block in by_block for row in block]).detach(), mine.detach(), gradients


def packed_batch(world: World, settings: EngineConfig) -> Result:
    """Returns the result for this process's images in one packed batch under an engine."""
    engine, step = make(world, settings, AdamWConfig(), MASKS)
    (micro,) = engine.accumulate(part(0, world))
    images = images_of(micro)
    masks, wanted = step.masks(0, micro.position, len(micro), BATCH)
    assert isinstance(masks, PackedMasks) and isinstance(wanted, Wanted)
    assert len(set(masks.context_layout.lengths)) > 1
    features = normalise_targets(engine.target(images, wanted=wanted.patches))
    prediction = engine.model(images, masks)
    loss = Regression(RegressionConfig()).compare(prediction, select_targets(features, wanted.rows, masks), masks)
    engine.backward(loss)
    return prediction.detach(), loss.detach(), full_gradients(engine)


def full_gradients(engine: Engine) -> dict[str, Tensor]:
    """Returns the full gradients, reduced over all processes."""
    module: nn.Module = engine.module  # type: ignore[attr-defined]
    gradients = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        else:
            gradient = parameter.grad
        gradients[clean_name(name)] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return gradients


def differences(world: World, engine: dict, variants: list[tuple[str, str | None]]) -> list[tuple[float, ...]]:
    """Returns, for each variant, the largest difference of predictions, loss, gradients, and the largest gradient."""
    prediction, loss, gradients = per_image(world)
    training.build_jepa = sharp_jepa  # type: ignore[assignment]
    compiled_blocks = parallelize.compile_blocks
    found = []
    for checkpointing, backend in variants:
        torch._dynamo.reset()
        parallelize.compile_blocks = functools.partial(compiled_blocks, backend=backend)  # type: ignore[assignment, arg-type]
        settings = EngineConfig(**engine, precision="fp32", checkpointing=checkpointing, compile=backend is not None)
        got = packed_batch(world, settings)
        assert got[2].keys() == gradients.keys()
        apart = max(float((got[2][name] - gradients[name]).abs().max()) for name in gradients)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        found.append((float((got[0] - prediction).abs().max()), float((got[1] - loss).abs()), apart, largest))
    return found


@pytest.mark.parametrize("name", ["plain", *(pytest.param(n, marks=pytest.mark.long) for n in ENGINES if n != "plain")])
def test_packed_equals_each_image_alone(name: str) -> None:
    processes, engine = ENGINES[name]
    for results in run(differences, processes, engine, VARIANTS, alone=name == "plain"):
        for variant, (prediction, loss, gradient, largest) in zip(VARIANTS, results, strict=True):
            assert prediction <= TOLERANCE and loss <= TOLERANCE and gradient <= TOLERANCE, variant
            assert largest > 1e3 * TOLERANCE  # the compared gradients aren't all tiny

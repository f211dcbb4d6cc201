"""Health's figures are the same under every engine and for any number of processes."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa_scale import rng
from ijepa_scale.config import AdamWConfig, EngineConfig, PretrainConfig
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.health import HealthConfig
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.evaluator import ImageSettings
from ijepa_scale.evaluate.health import VIEWS, HealthCheck
from ijepa_scale.evaluate.rank import lidar, rank_me
from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.types import DenseMasks
from ijepa_scale.metrics.meters import feature_std
from ijepa_scale.objectives.protocol import build_objective
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES, SHORT
from tests.distributed.training import MODEL, make, masks_config, part

IMAGES, GROUP, STEPS = 19, 8, 3  # a prime: with several processes some repeat an image, which mustn't count
SEED = 6
SOURCE = SyntheticSource(40, (32, 32), seed=2)
MEAN = STD = (0.5, 0.5, 0.5)


def check(world: World, chunk: int, **masks: object) -> HealthCheck:
    config = PretrainConfig(
        seed=SEED, model=MODEL, masks=masks_config(group_size=GROUP, **masks), health=HealthConfig(images=IMAGES),
        data=DataConfig(reader="synthetic", batch_size=8),
    )  # fmt: skip
    return HealthCheck(
        config, SOURCE, "data.train", images=ImageSettings(size=(32, 32), mean=MEAN, std=STD),
        objective=build_objective(config.objective), world=world, chunk=chunk,
    )  # fmt: skip


def measured(world: World, engine: dict, chunk: int, masks: dict) -> dict:
    """Returns the figures after a few steps, the norms of the last step's gradient by block, and the next losses."""
    torch.manual_seed(0)
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(), masks_config(**masks))
    health = check(world, chunk, **masks)
    for index in range(STEPS):
        step.by_block = index == STEPS - 1
        info = step(part(index, world))
    assert info.block_norms is not None
    norms = {name: float(norm) for name, norm in info.block_norms.items()}
    figures = health.measure(built)
    later = [float(world.mean(step(part(index, world)).loss.clone())) for index in range(STEPS, STEPS + 2)]
    return {"figures": figures, "norms": norms, "norm": float(info.grad_norm), "losses": later}


@functools.cache
def alone(chunk: int = 4, **masks: object) -> dict:
    return run(measured, 1, {"strategy": "plain"}, chunk, masks, alone=True)[0]


CASES = [
    *((name, 1) for name in ("ddp", "fsdp2", "zero2", "zero3")),
    *(pytest.param(name, 1, marks=pytest.mark.long) for name in ("hsdp", "zero1", "zero2_offload", "zero3_offload")),
    *(pytest.param(name, 2, marks=pytest.mark.long) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
]


@pytest.mark.parametrize(("name", "accumulation"), CASES)
def test_figures_are_those_of_one_process(name: str, accumulation: int) -> None:
    processes, engine = {**ENGINES, **SHORT}[name]
    found = run(measured, processes, {**engine, "accumulation": accumulation}, 4, {})
    expected = alone()
    for each in found:
        assert each["figures"] == found[0]["figures"]
        assert each["figures"] == pytest.approx(expected["figures"], rel=2e-4)
        assert each["norms"] == pytest.approx(expected["norms"], rel=1e-4, abs=1e-7)
        assert each["losses"] == pytest.approx(expected["losses"], abs=1e-5)  # measuring leaves the engine as it was
    assert math.hypot(*expected["norms"].values()) == pytest.approx(expected["norm"], rel=1e-5)


def test_chunks_do_not_change_the_figures_and_packed_contexts_are_measured_too() -> None:
    expected = alone()["figures"]
    assert alone(chunk=19)["figures"] == pytest.approx(expected, rel=1e-5)
    packed = alone(context="packed")["figures"]
    assert set(packed) == set(expected) and packed["rank_me"] != expected["rank_me"]  # it trained differently


def by_hand(world: World) -> tuple[dict, dict]:
    """Returns the figures, and the same computed image by image without a health check's code."""
    torch.manual_seed(0)
    built, step = make(world, EngineConfig(strategy="plain", precision="fp32"), AdamWConfig(), masks_config())
    for index in range(STEPS):
        step(part(index, world))
    return check(world, 4).measure(built), literal(built)


def literal(built: Engine) -> dict[str, float]:
    ids = [number * 40 // IMAGES for number in range(IMAGES)]
    images = torch.stack([torch.from_numpy(np.ascontiguousarray(SOURCE.read(n))).permute(2, 0, 1) for n in ids])
    images = (images.float() / 255 - 0.5) / 0.5
    sampler = MaskSampler(masks_config(group_size=GROUP), MODEL.grid, seed=rng.key(SEED, "health"))
    encoder, target = built.module.encoder, built.target_module  # type: ignore[attr-defined]
    predictor = built.module.predictor  # type: ignore[attr-defined]
    with torch.no_grad():
        tokens = target(images)
        normal = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
        mean = normal.mean(dim=0)
        views: list[list[Tensor]] = []
        losses, baselines, cosines = [], [], []
        for row in range(IMAGES):
            views.append([])
            for view in range(VIEWS):
                masks = sampler(view, 0, GROUP, GROUP)
                assert isinstance(masks, DenseMasks)
                keep, targets = masks.context[0, [row % GROUP]], masks.targets[:, [row % GROUP]]
                context = encoder(images[[row]], keep)
                guess = predictor(context, keep, targets)
                wanted = normal[row][targets[:, 0]]
                losses.append(torch.nn.functional.smooth_l1_loss(guess, wanted))
                baselines.append(torch.nn.functional.smooth_l1_loss(mean[targets[:, 0]], wanted))
                views[-1].append(context[0].mean(dim=0))
                own = torch.nn.functional.layer_norm(context[0], context.shape[-1:])
                cosines.append(torch.nn.functional.cosine_similarity(own, normal[row][keep[0]], dim=1).mean())
    patches = torch.arange(tokens.shape[1]).expand(IMAGES, -1)
    loss, baseline = torch.stack(losses).mean().item(), torch.stack(baselines).mean().item()
    return {
        "health_loss": loss,
        "relative_loss": loss / baseline,
        "feature_std": feature_std(normal, patches, tokens.shape[1]).item(),
        "rank_me": rank_me(tokens.mean(dim=1)),
        "lidar": lidar(torch.stack([torch.stack(each) for each in views])),
        "context_cosine": torch.stack(cosines).mean().item(),
    }


def test_figures_are_those_computed_image_by_image() -> None:
    found, expected = run(by_hand, 1, alone=True)[0]
    assert found == pytest.approx(expected, rel=1e-4)

"""Compares the real step with a loop in plain PyTorch, written image by image from the paper and the published recipe.

Tests that compare engines share the real step. This loop shares none of it: it has its own schedules, average, groups,
targets, gather and loss. test_engines and tests/golden compare the other engines.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, RegressionConfig
from ijepa_scale.engine.world import World
from ijepa_scale.errors import NonFiniteError
from ijepa_scale.masks import DenseMasks, MaskSampler, Wanted
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa
from ijepa_scale.objectives.regression import Regression
from ijepa_scale.schedules import Schedule
from ijepa_scale.train.step import TrainStep
from tests.distributed import training
from tests.distributed.training import BATCH, MODEL, full_state, images_of, make, masks_config, part

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
STEPS = 8  # 4 of warm-up, then the cosine
STEEP = Schedule(
    steps_per_epoch=4, epochs=2, warmup_epochs=1, ipe_scale=1.25, start_lr=1e-3, lr=1e-2, final_lr=1e-3,
    weight_decay=0.2, final_weight_decay=2.0, momentum=(0.5, 0.9),
)  # fmt: skip
# a large eps, so that gradients that are 0 except for rounding (of the keys' biases) change nothing
OPTIMIZER = AdamWConfig(betas=(0.8, 0.95), eps=1e-5)
TOLERANCE, MOMENT_TOLERANCE = 1e-6, 1e-7  # 2e-7 and 3e-8 were measured: sums are in another order
CASES: dict[
    str, tuple[dict[str, Any], dict[str, Any], float | None, int]
] = {  # masks, objective, clipping, accumulation
    "one group": ({}, {"beta": 0.1}, None, 1),
    "a group in each micro-batch": ({"group_size": 4}, {"loss": "l2"}, None, 2),
    "groups across micro-batches, 2 contexts": ({"group_size": 3, "num_context_blocks": 2}, {"beta": 0.1}, 0.2, 2),
    "packed, several groups": ({"group_size": 2, "context": "packed"}, {"loss": "l2"}, None, 2),
    "packed, 2 contexts": ({"group_size": 4, "context": "packed", "num_context_blocks": 2}, {"beta": 0.1}, None, 4),
}


def patches_of(sampler: MaskSampler, step: int, position: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the patches of one image's context blocks and of its target blocks."""
    masks = sampler(step, position, 1, BATCH)
    if isinstance(masks, DenseMasks):
        return list(masks.context[:, 0]), list(masks.targets[:, 0])
    contexts = list(masks.context_index.split(list(masks.context_layout.lengths)))
    return contexts, list(masks.target_index.split(list(masks.target_layout.lengths)))[:: len(contexts)]


def distance(prediction: Tensor, target: Tensor, objective: RegressionConfig) -> Tensor:
    difference = (prediction - target).abs()
    if objective.loss == "l2":
        return difference.square().mean()
    quadratic = 0.5 * difference.square() / objective.beta
    return torch.where(difference < objective.beta, quadratic, difference - 0.5 * objective.beta).mean()


def literal(masks: BlockMaskConfig, objective: RegressionConfig, clip: float | None) -> dict[str, Any]:
    """Returns the losses, the gradient norms and the final state of the loop."""
    jepa = build_jepa(MODEL, seed=3)
    target = copy.deepcopy(jepa.encoder)
    sampler = MaskSampler(masks, MODEL.grid, seed=5)
    spared = {n for n, _ in jepa.named_parameters() if n.endswith(".bias") or "norm" in n}
    groups = [[p for n, p in jepa.named_parameters() if (n in spared) == spares] for spares in (False, True)]
    assert sum(map(len, groups)) == len(list(jepa.parameters())) and "predictor.mask_token" not in spared
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.8, 0.95), eps=1e-5, lr=0.0
    )
    losses, norms = [], []
    for step in range(STEPS):
        # 4 steps per epoch, and 2 epochs stretched by 1.25, so the curves end at s = 10
        s = step + 1
        wave = 0.5 * (1 + math.cos(math.pi * (s - 4) / 6))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 + s / 4 * 9e-3 if s < 4 else 1e-3 + 9e-3 * wave
        optimizer.param_groups[0]["weight_decay"] = 2.0 - 1.8 * 0.5 * (1 + math.cos(math.pi * s / 10))
        momentum = 0.5 + 0.4 * step / 10

        images = images_of(part(step, ALONE))
        terms = []
        for position in range(BATCH):
            image = images[position : position + 1]
            contexts, targets = patches_of(sampler, step, position)
            with torch.no_grad():
                tokens = target(image)[0]
                tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, False, keepdim=True) + 1e-5).sqrt()
            for context in contexts:
                encoded = jepa.encoder(image, context[None])
                for wanted in targets:
                    prediction = jepa.predictor(encoded, context[None], wanted[None, None])[0]
                    terms.append(distance(prediction, tokens[wanted], objective))
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in jepa.parameters() if p.grad is not None])
        norm = float(gradients.norm())
        for parameter in jepa.parameters():
            if clip is not None and norm > clip and parameter.grad is not None:
                parameter.grad *= clip / norm
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(target.parameters(), jepa.encoder.parameters(), strict=True):
                average.copy_(momentum * average + (1 - momentum) * weight)
        losses.append(float(loss.detach()))
        norms.append(norm)
    state: dict[str, Tensor] = {f"model.{n}": p for n, p in jepa.named_parameters()}
    state |= {f"target.{n}": p for n, p in target.named_parameters()}
    for name, parameter in jepa.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
    return {"losses": losses, "norms": norms, "state": {n: t.detach().flatten() for n, t in state.items()}}


@pytest.mark.parametrize("name", CASES)
def test_the_real_step_equals_the_literal_loop(name: str) -> None:
    changes, distances, clip, accumulation = CASES[name]
    masks, objective = masks_config(**changes), RegressionConfig(**distances)
    expected = literal(masks, objective, clip)
    assert expected["losses"][-1] < 0.5 * expected["losses"][0]  # the training makes progress
    assert clip is None or min(expected["norms"]) > clip  # clipping is active
    settings = EngineConfig(strategy="plain", precision="fp32", accumulation=accumulation)
    optimizer = OPTIMIZER.replace(clip_norm=clip)
    built, step = make(ALONE, settings, optimizer, masks, objective=objective, schedule=STEEP)
    infos = [step(part(index, ALONE)) for index in range(STEPS)]
    assert [float(info.loss) for info in infos] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert [float(info.grad_norm) for info in infos] == pytest.approx(expected["norms"], abs=TOLERANCE)
    found = full_state(ALONE, built)
    assert found.keys() == expected["state"].keys()
    for tensor, wanted in expected["state"].items():
        atol = MOMENT_TOLERANCE if tensor.startswith("optimizer.") else TOLERANCE
        torch.testing.assert_close(found[tensor], wanted, atol=atol, rtol=0, msg=lambda text, n=tensor: f"{n}: {text}")

    with pytest.raises(NonFiniteError, match=f"step {STEPS}: process 0 has loss nan"):
        step(part(STEPS, ALONE, spoil=(STEPS, 0)))
    after = full_state(ALONE, built)
    assert all(torch.equal(after[tensor], found[tensor]) for tensor in found)


def test_the_meters_equal_a_loop_over_patches() -> None:
    masks, num_patches = masks_config(num_context_blocks=2, allow_overlap=True), MODEL.grid[0] * MODEL.grid[1]
    built, step = make(ALONE, EngineConfig(strategy="plain", precision="fp32"), OPTIMIZER, masks, schedule=STEEP)
    for index in range(STEPS):
        step(part(index, ALONE))
    target = build_jepa(MODEL, seed=11).encoder
    kept = full_state(ALONE, built)
    target.load_state_dict({n: kept[f"target.{n}"].view(p.shape) for n, p in target.named_parameters()}, strict=False)
    drawn = MaskSampler(masks, MODEL.grid, seed=5)(STEPS, 0, BATCH, BATCH)
    assert isinstance(drawn, DenseMasks)
    patches = Wanted.of(drawn, BATCH, num_patches).patches
    with torch.no_grad():
        tokens = target(images_of(part(STEPS, ALONE)))
        assert tokens.std(-1, False).sub(1).abs().max() > 5e-3  # trained norm: normalising again matters
        tokens = F.layer_norm(tokens, (MODEL.width,), eps=1e-5)
    squares, freedom = torch.zeros(tokens.shape[-1]), 0
    for patch in range(num_patches):
        found = tokens[(patches == patch).any(dim=1), patch]
        if len(found):
            squares += (found - found.mean(dim=0)).square().sum(dim=0)
            freedom += len(found) - 1
    step.meters.flush()
    info = step(part(STEPS, ALONE))
    means = step.meters.flush()
    assert means["target_std"] == pytest.approx(float((squares / freedom).sqrt().mean()), abs=1e-5)
    assert (means["loss"], means["grad_norm"]) == pytest.approx((float(info.loss), float(info.grad_norm)), abs=1e-6)
    tokens_of_blocks = drawn.context.shape[2], drawn.targets.shape[2]
    assert (means["context_tokens"], means["target_tokens"]) == tokens_of_blocks and len(set(tokens_of_blocks)) == 2


def test_a_grid_may_be_wider_than_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MODEL", MODEL.replace(image_size=(16, 64)))
    built, _ = make(ALONE, EngineConfig(strategy="plain", precision="fp32"), OPTIMIZER, masks_config())
    step = TrainStep(
        built,
        augment=lambda batch: images_of(batch).reshape(-1, 3, 16, 64),
        masks=MaskSampler(masks_config(), (4, 16), seed=5),
        schedule=STEEP,
        objective=Regression(RegressionConfig()),
        batch_size=BATCH,
        meters=Meters(ALONE.device),
    )
    step(part(0, ALONE))
    assert 0.0 < step.meters.flush()["target_std"] < 2.0

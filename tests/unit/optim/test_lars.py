"""LARS against its formula for each weight, its stop flag and its refusals."""

from __future__ import annotations

import pytest
import torch
from timm.optim.lars import Lars as TimmLars

from ijepa_scale.config import AdamWConfig, EngineConfig, ModelConfig
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models import build_jepa
from ijepa_scale.optim.groups import parameter_groups, set_hyper
from ijepa_scale.optim.kind import build_optimizer, optimizer_kind
from ijepa_scale.optim.lars import LarsConfig, LarsOptimizer
from ijepa_scale.schedules import Hyper

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
MODEL = ModelConfig(
    name="vit_tiny", image_size=16, patch_size=8, width=24, depth=1, heads=3, predictor_width=12, predictor_depth=1
)
CONFIG = LarsConfig(momentum=0.8, trust_coefficient=0.02)


def gradient(step: int, index: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + index))


def hyper(step: int) -> Hyper:
    return Hyper(lr=0.5 / (1 + step), weight_decay=0.1 * step, momentum=1.0)


def by_hand(weight: torch.Tensor, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight and its momentum after these gradients, computed by the formula in float64."""
    weight, velocity = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for step, each in enumerate(gradients):
        move = each.double()
        if weight.ndim > 1:
            move = move + hyper(step).weight_decay * weight
            length, size = weight.norm().item(), move.norm().item()
            if length > 0 and size > 0:
                move = move * CONFIG.trust_coefficient * length / size
        velocity = CONFIG.momentum * velocity + move
        weight = weight - hyper(step).lr * velocity
    return weight, velocity


def lars(module: torch.nn.Module):
    return build_optimizer(module, CONFIG, groups=parameter_groups, strategy="plain")


def test_ten_steps_follow_the_formula() -> None:
    module = build_jepa(MODEL, seed=0)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        module.predictor.mask_token.zero_()  # its norm is 0, so q is 1
        start["predictor.mask_token"].zero_()
    optimizer = lars(module)
    for step in range(10):
        for index, parameter in enumerate(module.parameters()):
            parameter.grad = gradient(step, index, parameter.shape)
        set_hyper(optimizer.param_groups, hyper(step))
        optimizer.step()
    kinds = set()
    for index, (name, parameter) in enumerate(module.named_parameters()):
        gradients = [gradient(step, index, parameter.shape) for step in range(10)]
        weight, velocity = by_hand(start[name], gradients)
        torch.testing.assert_close(parameter.detach().double(), weight, atol=1e-6, rtol=1e-5)
        found = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(found.double(), velocity, atol=1e-6, rtol=1e-5)
        assert set(optimizer.state[parameter]) == set(LarsConfig.state_names)
        kinds.add(parameter.ndim)
    assert kinds == {1, 2, 3, 4}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_agrees_with_timms_without_decay(decay: float) -> None:
    """timm divides by |g| + decay * |w|, as algorithm 1 of the paper does, so with decay the steps differ."""
    shape = torch.Size([7, 5])
    ours, theirs = (gradient(0, 0, shape).requires_grad_() for _ in range(2))
    optimizers = (
        LarsOptimizer([{"params": [ours]}], lr=0.5, momentum=0.9, trust_coefficient=0.02, weight_decay=decay),
        TimmLars([theirs], lr=0.5, momentum=0.9, trust_coeff=0.02, weight_decay=decay, always_adapt=True),
    )
    for step in range(10):
        ours.grad, theirs.grad = gradient(step, 1, shape), gradient(step, 1, shape)
        for optimizer in optimizers:
            optimizer.step()
    same = torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert same == (decay == 0)
    assert (ours - gradient(0, 0, shape)).abs().max() > 0.1  # they did move


def test_a_zero_gradient_without_decay_changes_nothing() -> None:
    module = build_jepa(MODEL, seed=0)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = lars(module)
    set_hyper(optimizer.param_groups, hyper(0))
    module.encoder.norm.weight.grad = torch.zeros(24)
    module.encoder.blocks[0].mlp.fc1.weight.grad = torch.zeros_like(module.encoder.blocks[0].mlp.fc1.weight)
    optimizer.step()  # parameters without gradients stay the same too
    assert all(torch.equal(parameter, start[name]) for name, parameter in module.named_parameters())


def test_found_inf_stops_weights_and_momentum() -> None:
    module = build_jepa(MODEL, seed=0)
    optimizer = lars(module)
    set_hyper(optimizer.param_groups, hyper(1))
    states = []
    for found in (0.0, 1.0, 1.0):
        for index, parameter in enumerate(module.parameters()):
            parameter.grad = gradient(0, index, parameter.shape) + (torch.nan if found else 0.0)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        state = [optimizer.state[parameter]["momentum_buffer"] for parameter in module.parameters()]
        states.append([tensor.detach().clone() for tensor in (*module.parameters(), *state)])
    first, *others = states
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert all(state.abs().sum() > 0 for state in first[len(first) // 2 :])
    assert optimizer_kind(CONFIG, "ddp").stopped_on_device(CONFIG)  # engines rely on it


def test_zero_is_refused() -> None:
    for stage in (1, 2, 3):
        engine = EngineConfig(strategy="deepspeed", ds_config=f"ds_configs/zero{stage}.json")
        with pytest.raises(
            ConfigError,
            match=rf"name is lars but the ZeRO stage is {stage}: LARS needs the norm of each weight, .*; set "
            "engine.strategy=fsdp2 or ddp, or optimizer.name=adamw",
        ):
            build_engine(WORLD, engine, LarsConfig())
        assert AdamWConfig().refusal(stage) is None


@pytest.mark.parametrize(
    ("text", "settings"),
    {
        "momentum is 1.0; give a number from 0 to below 1": {"momentum": 1.0},
        "trust_coefficient is -1": {"trust_coefficient": -1},
    }.items(),
)
def test_values_out_of_range_are_refused(text: str, settings: dict) -> None:
    with pytest.raises(ConfigError, match=text):
        LarsConfig(**settings)

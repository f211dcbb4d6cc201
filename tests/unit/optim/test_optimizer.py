from __future__ import annotations

import importlib.util

import pytest
import torch

from ijepa_scale.config import AdamWConfig, ModelConfig
from ijepa_scale.engine.target_update import TargetUpdate
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.registry import build_jepa
from ijepa_scale.optim.adamw import AdamW
from ijepa_scale.optim.groups import check_groups, parameter_groups, set_hyper
from ijepa_scale.optim.kind import OptimizerKind, build_optimizer, optimizer_kind
from ijepa_scale.registry import OPTIMIZERS
from ijepa_scale.schedules import Hyper

MODEL = ModelConfig(
    name="vit_tiny", image_size=16, patch_size=8, width=24, depth=1, heads=3, predictor_width=12, predictor_depth=1
)


def test_the_four_published_groups() -> None:
    module = build_jepa(MODEL, seed=0)
    names = {id(p): n for n, p in module.named_parameters()}
    groups = parameter_groups(module)
    assert [g["name"] for g in groups] == ["encoder", "predictor", "encoder 1-D", "predictor 1-D"]
    assert sum(len(g["params"]) for g in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name.startswith(group["name"].split()[0] + ".")
            assert group["decay"] == (parameter.ndim > 1)
    assert any(names[id(p)] == "predictor.mask_token" for p in groups[1]["params"])  # 3-D, so it decays


def test_a_parameter_without_a_group_is_refused() -> None:
    module = build_jepa(MODEL, seed=0)
    module.register = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"no parameter group holds register, so it would never .* or freeze it"):
        parameter_groups(module)
    with pytest.raises(ValueError, match="no parameter group holds .*register"):
        build_optimizer(module, AdamWConfig(), groups=lambda module: [], strategy="plain")
    module.register.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(module)) == len(list(module.parameters())) - 1


def test_a_parameter_in_two_groups_is_refused() -> None:
    module = build_jepa(MODEL, seed=0)
    groups = parameter_groups(module)
    assert check_groups(module, groups) is groups
    with pytest.raises(ValueError, match=r"encoder\.norm\.weight more than once, so each step would update it twice"):
        check_groups(module, [*groups, {"params": [module.encoder.norm.weight], "decay": True}])
    module.predictor.predictor_proj.bias = module.encoder.norm.bias
    with pytest.raises(ValueError, match=r"hold encoder\.norm\.bias = predictor\.predictor_proj\.bias more than once"):
        parameter_groups(module)


def test_optimizers_are_found_by_name_with_their_section() -> None:
    for name in OPTIMIZERS.names():
        kind = OPTIMIZERS.get(name)
        assert issubclass(kind, OptimizerKind) and kind.Config().name == name
        assert optimizer_kind(kind.Config(), "ddp") is kind
        state = kind.new_state(torch.ones(2, 3))
        assert all(torch.equal(state[key], torch.zeros(2, 3)) for key in kind.Config.state_names)
    with pytest.raises(ConfigError, match="optimizer.name is 'sgd'; choose one of adamw, lars"):
        optimizer_kind(AdamWConfig(name="sgd"), "plain")
    with pytest.raises(ConfigError, match="name is lars but the section is of type AdamWConfig; use LarsConfig"):
        optimizer_kind(AdamWConfig(name="lars"), "plain")


def test_which_implementations_a_flag_on_the_device_stops() -> None:
    assert all(AdamW.stopped_on_device(AdamWConfig(impl=impl)) for impl in ("auto", "torch", "fused_tail"))
    assert not any(AdamW.stopped_on_device(AdamWConfig(impl=impl)) for impl in ("apex", "deepspeed"))


def test_weight_decay_is_zero_in_groups_without_decay() -> None:
    groups = parameter_groups(build_jepa(MODEL, seed=0))
    set_hyper(groups, Hyper(lr=0.5, weight_decay=0.25, momentum=1.0))
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.5, 0.25), (0.5, 0.25), (0.5, 0.0), (0.5, 0.0)]


def test_adam_follows_its_definition_and_set_step_sets_its_counter() -> None:
    module = build_jepa(MODEL, seed=0)
    optimizer = build_optimizer(module, AdamWConfig(), groups=parameter_groups, strategy="plain")
    set_hyper(optimizer.param_groups, Hyper(lr=0.01, weight_decay=0.1, momentum=1.0))
    parameter = module.encoder.blocks[0].mlp.fc1.weight
    before = parameter.detach().clone()
    parameter.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    gradient = parameter.grad.clone()
    optimizer.step()
    step = gradient / (gradient.abs() + 1e-8)  # from the bias-corrected moments of the first step
    assert torch.allclose(parameter, before * (1 - 0.01 * 0.1) - 0.01 * step, atol=1e-6)
    AdamW.set_step(optimizer, 41)
    assert optimizer.state[parameter]["step"] == 41


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed")
def test_missing_apex_is_refused() -> None:
    with pytest.raises(ConfigError, match="NVIDIA's apex with its CUDA extensions isn't installed"):
        build_optimizer(build_jepa(MODEL, seed=0), AdamWConfig(impl="apex"), groups=parameter_groups, strategy="plain")


def test_target_update() -> None:
    target, source = [torch.zeros(3), torch.ones(2)], [torch.full((3,), 4.0), torch.ones(2)]
    TargetUpdate()(target, source, 0.75)
    assert torch.equal(target[0], torch.ones(3)) and torch.equal(target[1], torch.ones(2))
    TargetUpdate()(target, source, 1.0)
    assert torch.equal(target[0], torch.ones(3))
    with pytest.raises(AssertionError, match="must be fp32"):
        TargetUpdate()([torch.zeros(1, dtype=torch.bfloat16)], [torch.zeros(1)], 0.5)
    with pytest.raises(AssertionError, match="sharded differently"):
        TargetUpdate()([torch.zeros(1)], [torch.zeros(2)], 0.5)

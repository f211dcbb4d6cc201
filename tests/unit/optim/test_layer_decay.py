"""Layer-wise learning rates: compares scales and decay with the formula, with timm and with a step of AdamW."""

from __future__ import annotations

import functools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.optim import param_groups_layer_decay

from ijepa_scale.config import AdamWConfig, EncoderConfig
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.engine.parallelize import checkpoint_blocks
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.optim.groups import layer_decay_groups, set_hyper
from ijepa_scale.optim.kind import build_optimizer
from ijepa_scale.schedules import Hyper

DEPTH = 11  # two digits: block 10 must not be mistaken for block 1
SIZES = dict(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=DEPTH, heads=3)


def classifier(**changes):
    return build_classifier(ClassifierConfig(encoder=EncoderConfig(**SIZES), **{"num_classes": 5, **changes}))


def by_name(module, groups) -> dict[str, tuple[float, bool]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [(names[id(p)], (g["lr_scale"], g["decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))  # each parameter once
    return dict(found)


def expected_scale(name: str, layer_decay: float) -> float:
    if name.startswith(("encoder.patch_embed.", "encoder.pos_embed")):
        return layer_decay ** (DEPTH + 1)
    if name.startswith("encoder.blocks."):
        return layer_decay ** (DEPTH + 1 - (int(name.split(".")[2]) + 1))
    return 1.0


@pytest.mark.parametrize("layer_decay", [0.65, 0.75, 1.0])
@pytest.mark.parametrize("pool_norm", ["after", "before"])
def test_each_parameter_has_its_scale(layer_decay: float, pool_norm: str) -> None:
    module = classifier(pool_norm=pool_norm)
    found = by_name(module, layer_decay_groups(module, layer_decay=layer_decay))
    assert found.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert found[name] == (pytest.approx(expected_scale(name, layer_decay)), parameter.ndim > 1), name


def test_scales_equal_timms() -> None:
    """timm gives a norm before pooling the last block's scale, MAE and we the head's. `fc_norm` doesn't differ."""
    module = classifier()
    twin = TimmVisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=3, class_token=False, global_pool="avg",
        fc_norm=True, num_classes=5,
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    theirs = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"] > 0)
        for group in param_groups_layer_decay(twin, layer_decay=0.75, no_weight_decay_list=["pos_embed"])
        for parameter in group["params"]
    }
    theirs.pop("pos_embed")  # a parameter in timm, fixed here
    ours = by_name(module, layer_decay_groups(module, layer_decay=0.75))
    assert {name.removeprefix("encoder."): pytest.approx(found) for name, found in ours.items()} == theirs


def test_position_embeddings_never_decay_and_have_the_rate_of_the_patches() -> None:
    module = classifier()
    del module.encoder.pos_embed
    module.encoder.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 24))
    found = by_name(module, layer_decay_groups(module, layer_decay=0.5))
    assert found["encoder.pos_embed"] == (0.5 ** (DEPTH + 1), False)


def test_frozen_and_wrapped_blocks_do_not_change_the_scales_of_others() -> None:
    whole, module = classifier(), classifier(frozen_blocks=3)
    expected = by_name(whole, layer_decay_groups(whole, layer_decay=0.75))
    checkpoint_blocks(module, "full")
    found = {
        n.replace("_checkpoint_wrapped_module.", ""): v
        for n, v in by_name(module, layer_decay_groups(module, layer_decay=0.75)).items()
    }
    frozen = ("encoder.patch_embed.", "encoder.blocks.0.", "encoder.blocks.1.", "encoder.blocks.2.")
    assert found == {name: value for name, value in expected.items() if not name.startswith(frozen)}


def test_the_schedule_keeps_the_scales_and_adam_uses_them() -> None:
    module = classifier()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(
        module,
        AdamWConfig(),
        groups=functools.partial(layer_decay_groups, layer_decay=0.75),
        strategy="plain",
    )
    for lr in (0.5, 0.01):  # twice: the second pass shows whether a scale was overwritten
        set_hyper(optimizer.param_groups, Hyper(lr=lr, weight_decay=0.1))
        for group in optimizer.param_groups:
            assert group["lr"] == lr * group["lr_scale"] and group["weight_decay"] == (0.1 if group["decay"] else 0.0)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        lr = 0.01 * expected_scale(name, 0.75)
        decayed = start[name] * (1 - lr * 0.1) if parameter.ndim > 1 else start[name]
        torch.testing.assert_close(parameter.detach(), decayed - lr, atol=2e-7, rtol=1e-6)


def test_a_parameter_of_an_unknown_layer_is_refused() -> None:
    module = classifier()
    module.encoder.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 24))
    with pytest.raises(ValueError, match=r"no parameter group holds encoder\.cls_token, so it would never train"):
        layer_decay_groups(module, layer_decay=0.75)
    module.encoder.cls_token.requires_grad_(False)
    assert layer_decay_groups(module, layer_decay=0.75)
    module.head.bias = module.encoder.norm.bias = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"hold encoder\.norm\.bias = head\.bias more than once"):
        layer_decay_groups(module, layer_decay=0.75)


def test_bad_decays_and_modules_without_blocks_are_refused() -> None:
    for layer_decay in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"layer_decay is {layer_decay}; give a number above 0 and at most 1"):
            layer_decay_groups(classifier(), layer_decay=layer_decay)
    with pytest.raises(ValueError, match=r"Linear has no parameters named blocks\.N; give a module with an encoder"):
        layer_decay_groups(torch.nn.Linear(2, 2), layer_decay=0.5)

import pytest
import torch
from torch import nn

from ijepa_scale.config import ModelConfig
from ijepa_scale.models import build_encoder, build_predictor, registry
from ijepa_scale.models.init import initialise

SIZES = {"image_size": 32, "patch_size": 8}


def test_a_seed_fixes_every_bit_and_another_changes_every_weight():
    first, again, other = (build_encoder("vit_tiny", depth=2, seed=seed, **SIZES).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name.endswith("weight") and "norm" not in name]
    assert len(drawn) == 9 and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_encoder_and_predictor_draw_other_numbers():
    first_of_encoder = build_encoder("vit_tiny", depth=1, **SIZES).patch_embed.proj.weight.flatten()[:384]
    first_of_predictor = build_predictor("vit_tiny", depth=1, **SIZES).mask_token.flatten()
    assert not torch.equal(first_of_encoder, first_of_predictor)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    first = build_encoder("vit_tiny", depth=1, **SIZES).state_dict()
    state = torch.get_rng_state()
    build_encoder("vit_tiny", depth=1, **SIZES)
    build_predictor("vit_tiny", depth=1, **SIZES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_encoder("vit_tiny", depth=1, **SIZES).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("build", [build_encoder, build_predictor])
def test_the_published_distributions(build):
    model = build("vit_small", depth=3, **SIZES)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert abs(value.mean()) < 5 * 0.02 / value.numel() ** 0.5, name
            if value.numel() > 10_000:
                assert value.std().item() == pytest.approx(0.02, rel=0.02), name
            assert value.abs().max() < 0.02 * 6.5, name  # none of the outliers that truncating by inverse CDF makes


def test_every_parameter_is_written():
    encoder = build_encoder("vit_tiny", depth=2, **SIZES)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(float("nan"))
    initialise(encoder, torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


def test_rescaling_divides_the_two_last_projections_of_block_l_by_the_root_of_2l():
    plain = dict(build_encoder("vit_tiny", depth=3, **SIZES).named_parameters())
    rescaled = dict(build_encoder("vit_tiny", depth=3, rescale_residual=True, **SIZES).named_parameters())
    for name, value in plain.items():
        divisor = 1.0
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            divisor = {"0": 2**0.5, "1": 2.0, "2": 6**0.5}[name.split(".")[1]]
        torch.testing.assert_close(rescaled[name], value / divisor)
    predictor = build_predictor("vit_tiny", depth=2, rescale_residual=True, **SIZES)
    assert predictor.predictor_blocks[1].mlp.fc2.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_a_parameter_of_no_known_layer_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match="no initialisation is known for 1.gamma; add it to models/init.py"):
        initialise(nn.Sequential(nn.Linear(2, 2), Scale()), torch.Generator())


@pytest.mark.parametrize(("layer", "name"), [(nn.Linear(2, 2), "0.gamma"), (nn.LayerNorm(2), "0.gamma")])
def test_a_parameter_that_a_known_layer_does_not_have_is_refused(layer, name):
    layer.gamma = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"no initialisation is known for {name}; add it to models/init.py"):
        initialise(nn.Sequential(layer), torch.Generator())


def grown(kind, grow):
    """Returns the class with something more in it."""

    class Grown(kind):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            grow(self)

    return Grown


@pytest.mark.parametrize(
    ("kind", "grow", "message"),
    [
        (
            "VisionTransformer",
            lambda module: module.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 8))),
            "no initialisation is known for cls_token; add it to models/init.py",
        ),
        (
            "Predictor",
            lambda module: module.register_buffer("mean", torch.zeros(8)),
            "no values are known for the buffers mean of Grown; .* add others to models/registry.py",
        ),
        (
            "JEPA",
            lambda module: module.register_parameter("scale", nn.Parameter(torch.zeros(8))),
            "scale of Grown are neither the encoder's nor the predictor's, so nothing initialises or trains them; put",
        ),
        (
            "JEPA",
            lambda module: module.register_buffer("centre", torch.zeros(8)),
            "centre of Grown are neither the encoder's nor the predictor's",
        ),
    ],
)
def test_the_builder_refuses_what_nobody_claims(kind, grow, message, monkeypatch):
    monkeypatch.setattr(registry, kind, grown(getattr(registry, kind), grow))
    with pytest.raises(ValueError, match=message):
        registry.build_jepa(ModelConfig(name="vit_tiny", depth=1, predictor_depth=1, **SIZES), seed=0)

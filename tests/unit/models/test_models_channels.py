"""Encoders for images of other channels: the model, what is counted of it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale.config import ModelConfig
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.models.registry import build_encoder, build_jepa
from ijepa_scale.planning.activations import activations
from ijepa_scale.planning.flops import encoder_forward_flops
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.tokens import Tokens

SMALL = {"image_size": (16, 24), "patch_size": 4, "width": 48, "depth": 2, "heads": 2}


@pytest.mark.parametrize("channels", [1, 3, 4, 13, 16])
def test_the_model_has_what_is_counted(channels):
    config = ModelConfig(name="vit_tiny", channels=channels, predictor_width=24, predictor_depth=1, **SMALL)
    jepa = build_jepa(config, seed=0)
    counted = count_parameters(config)
    assert sum(parameter.numel() for parameter in jepa.parameters()) == counted.trainable
    assert jepa.encoder.patch_embed.proj.weight.shape == (48, channels, 4, 4)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        meta = build_encoder("vit_tiny", channels=channels, device="meta", **SMALL)
        assert meta(torch.empty(2, channels, 16, 24, device="meta")).shape == (2, 24, 48)
    assert counter.get_total_flops() == 2 * encoder_forward_flops(config)


def test_the_patches_hold_all_channels():
    encoder = build_encoder("vit_tiny", channels=5, **SMALL)
    images = torch.randn(2, 5, 16, 24)
    by_convolution = torch.nn.functional.conv2d(
        images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=4
    )
    torch.testing.assert_close(encoder.patch_embed(images), by_convolution.flatten(2).transpose(1, 2))


def test_rgb_draws_the_weights_that_it_always_drew():
    plain, named = build_encoder("vit_tiny", **SMALL), build_encoder("vit_tiny", channels=3, **SMALL)
    for (name, one), (_, other) in zip(plain.state_dict().items(), named.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_memory_grows_with_the_pixels_only():
    small, large = (
        activations(ModelConfig(name="vit_tiny", channels=channels, **SMALL), TOKENS, precision="fp32")
        for channels in (3, 13)
    )
    assert large.inputs - small.inputs == 4 * TOKENS.images * 10 * 16 * 24
    assert large.encoder - small.encoder == 4 * TOKENS.context * 10 * 4 * 4
    assert large.predictor == small.predictor and large.loss == small.loss


TOKENS = Tokens(images=2, patches=24, context=30.0, predictor=60.0, predicted=24.0, wanted=20.0, packed=False)


def test_images_of_other_channels_are_refused():
    encoder = build_encoder("vit_tiny", channels=13, **SMALL)
    text = r"images are \(1, 3, 16, 24\); this encoder takes \(B, 13, 16, 24\): build it with .* those channels"
    with pytest.raises(ValueError, match=text):
        encoder(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match="model.channels is 17; give a number from 1 to 16"):
        build_encoder("vit_tiny", channels=17, **SMALL)


def test_the_classifier_takes_them_from_its_encoder():
    config = ClassifierConfig(encoder={"name": "vit_tiny", "channels": 4, **SMALL}, num_classes=3, drop_path=0.0)
    assert build_classifier(config)(torch.zeros(2, 4, 16, 24)).shape == (2, 3)

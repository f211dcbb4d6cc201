"""Compares our encoder with timm's, which loads the published I-JEPA weights; both have the same weights here."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from ijepa_scale.models import build_encoder
from ijepa_scale.models.pos_embed import resample

CASES = {
    "tiny": dict(name="vit_tiny", image_size=(224, 224), patch_size=16),
    "giant's ratio": dict(name="vit_giant", image_size=(64, 96), patch_size=16, width=88, depth=3, heads=4),
    "huge, patch 14": dict(name="vit_huge", image_size=(56, 56), patch_size=14, width=160, depth=4, heads=2),
}


def shaken(encoder):
    """Changes every parameter from its initial value, so that no bias, norm or gain is trivial."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


def timm_twin(encoder, mlp_ratio):
    twin = TimmVisionTransformer(
        img_size=tuple(side * encoder.patch_size for side in encoder.grid),
        patch_size=encoder.patch_size,
        embed_dim=encoder.width,
        depth=len(encoder.blocks),
        num_heads=encoder.blocks[0].attn.heads,
        mlp_ratio=mlp_ratio,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    )
    twin.load_state_dict(encoder.state_dict())  # strict: our names are timm's, which are the published ones
    return twin.eval()


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_gradients_equal_timms(case):
    encoder = shaken(build_encoder(**CASES[case]))
    twin = timm_twin(encoder, 48 / 11 if "giant" in case else 4)
    images = torch.randn(2, 3, *CASES[case]["image_size"], generator=torch.Generator().manual_seed(1))
    ours, theirs = encoder(images), twin.forward_features(images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / ours[0].numel()
    gradients = torch.autograd.grad(ours, list(encoder.parameters()), upstream)
    theirs_by_name = dict(twin.named_parameters())
    wanted = torch.autograd.grad(theirs, [theirs_by_name[name] for name, _ in encoder.named_parameters()], upstream)
    for got, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_last_layers_equal_timms():
    encoder = shaken(build_encoder(**CASES["huge, patch 14"]))
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    theirs = timm_twin(encoder, 4).forward_intermediates(
        images, indices=3, norm=True, output_fmt="NLC", intermediates_only=True
    )
    for got, expected in zip(encoder.features(images, last=3), theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(28, 28), (7, 7), (10, 24)])
def test_resampling_equals_timms(grid):
    pos = torch.randn(1, 14 * 14, 12, generator=torch.Generator().manual_seed(0))
    theirs = resample_abs_pos_embed(pos, list(grid), [14, 14], num_prefix_tokens=0)
    torch.testing.assert_close(resample(pos, (14, 14), grid), theirs, atol=1e-6, rtol=1e-6)

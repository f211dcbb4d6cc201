import pytest
import torch

import ijepa_scale
from ijepa_scale.errors import ConfigError
from ijepa_scale.models import VisionTransformer, build_encoder, build_predictor
from tests.unit.models.packing_by_hand import SIZES, images_of, random_masks, small_jepa

BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize(
    ("name", "patch_size", "image_size", "millions"),
    [
        ("vit_tiny", 16, 224, 5.5),
        ("vit_small", 16, 224, 21.7),
        ("vit_base", 16, 224, 85.8),
        ("vit_large", 16, 224, 303.3),
        ("vit_huge", 14, 224, 630.8),
        ("vit_huge", 16, 448, 631.7),
        ("vit_giant", 16, 224, 1011.4),
    ],
)
def test_parameters_in_millions_position_embedding_included(name, patch_size, image_size, millions):
    encoder = build_encoder(name, patch_size=patch_size, image_size=image_size, device="meta")
    assert {tensor.device.type for tensor in encoder.state_dict().values()} == {"meta"}
    assert round(sum(tensor.numel() for tensor in encoder.state_dict().values()) / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "depth", "heads", "width"), [("vit_base", 6, 12, 768), ("vit_giant", 16, 16, 1408)])
def test_the_predictor_has_the_encoders_heads_and_its_own_depth(name, depth, heads, width):
    predictor = build_predictor(name, device="meta")
    assert len(predictor.predictor_blocks) == depth
    assert {block.attn.heads for block in predictor.predictor_blocks} == {heads}
    assert predictor.predictor_embed.weight.shape == (384, width)
    assert predictor.predictor_blocks[0].mlp.fc1.weight.shape == (1536, 384)


def test_the_giants_mlp_is_48_elevenths_of_its_width():
    assert build_encoder("vit_giant", device="meta").blocks[39].mlp.fc1.weight.shape == (6144, 1408)


def test_encoder_state_dict_names():
    encoder = build_encoder("vit_tiny", depth=2, device="meta")
    expected = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    expected += [f"blocks.{n}.{name}" for n in range(2) for name in BLOCK]
    assert sorted(encoder.state_dict()) == sorted(expected)
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert encoder.state_dict()["pos_embed"].shape == (1, 196, 192)


def test_predictor_state_dict_names():
    predictor = build_predictor("vit_tiny", depth=2, device="meta")
    layers = ["predictor_embed", "predictor_norm", "predictor_proj"]
    expected = ["mask_token", "predictor_pos_embed"] + [f"{n}.{kind}" for n in layers for kind in ("weight", "bias")]
    expected += [f"predictor_blocks.{n}.{name}" for n in range(2) for name in BLOCK]
    assert sorted(predictor.state_dict()) == sorted(expected)
    assert dict(predictor.named_parameters())["mask_token"].shape == (1, 1, 384)
    assert "predictor_pos_embed" not in dict(predictor.named_parameters())


def test_the_package_offers_the_builders():
    assert ijepa_scale.build_encoder is build_encoder and ijepa_scale.build_predictor is build_predictor
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it offers __version__, build_encoder"):
        _ = ijepa_scale.nothing


def test_blocks_that_see_all_places_equal_the_encoder_without_masks():
    encoder, images = small_jepa().encoder, images_of(2)
    everything = torch.arange(24).expand(2, 24)
    torch.testing.assert_close(encoder(images, everything), encoder(images), atol=1e-6, rtol=1e-6)


def test_kept_places_are_embedded_with_their_position_and_encoded_alone():
    encoder, images = small_jepa().encoder, images_of(2)
    keep = random_masks(1, 1, 2).context[0]
    tokens = encoder.patch_embed(images) + encoder.pos_embed
    for image in range(2):
        x = tokens[image][keep[image]][None]
        for block in encoder.blocks:
            x = block(x)
        torch.testing.assert_close(encoder(images, keep)[image], encoder.norm(x)[0], atol=1e-6, rtol=1e-6)


def test_wanted_tokens_are_the_encoders_at_these_places():
    encoder, images = small_jepa().encoder, images_of(3)
    wanted = random_masks(1, 1, 3).context[0]
    expected = encoder(images).gather(1, wanted[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(encoder(images, wanted=wanted), expected, atol=2e-6, rtol=2e-6)
    with pytest.raises(ValueError, match="more than one of keep, index, wanted and last"):
        encoder(images, wanted, wanted=wanted)


def test_chosen_patches_are_those_of_the_convolution():
    encoder, images = small_jepa().encoder, images_of(2)
    proj = encoder.patch_embed.proj
    every = torch.nn.functional.conv2d(images, proj.weight, proj.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(images), every, atol=2e-6, rtol=2e-6)
    index = torch.tensor([30, 5, 5, 47])
    torch.testing.assert_close(encoder.patch_embed(images, index), every.flatten(0, 1)[index], atol=2e-6, rtol=2e-6)


def test_several_context_blocks_equal_separate_calls():
    encoder, images = small_jepa().encoder, images_of(2)
    keep = random_masks(3, 1, 2).context
    together = encoder.encode_blocks(images, keep)
    assert together.shape == (6, 7, 16)
    torch.testing.assert_close(together, torch.cat([encoder(images, one) for one in keep]), atol=1e-6, rtol=1e-6)


def test_patches_are_row_major():
    encoder = small_jepa().encoder
    images = torch.zeros(1, 3, 16, 24)
    images[0, :, 4:8, 20:24] = 1.0  # row 1, column 5
    changed = (encoder.patch_embed(images) - encoder.patch_embed(torch.zeros_like(images))).abs().sum(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 6 + 5]


def test_features_are_the_last_blocks_after_the_final_norm():
    encoder, images = small_jepa().encoder, images_of(2)
    first, last = encoder.features(images, last=2)
    x = encoder.blocks[0](encoder.patch_embed(images) + encoder.pos_embed)
    assert torch.equal(first, encoder.norm(x))
    assert torch.equal(last, encoder(images))


def test_every_way_through_the_encoder_is_seen_by_module_hooks():
    encoder, images = small_jepa().encoder, images_of(1)
    calls = []
    encoder.register_forward_pre_hook(lambda module, arguments: calls.append(1))
    layout = ijepa_scale.models.vit.SequenceLayout.of((2,))
    encoder.features(images)
    encoder.encode_blocks(images, torch.zeros(1, 1, 2, dtype=torch.int64))
    encoder.encode_packed(images, torch.tensor([0, 1]), layout)
    assert len(calls) == 3


@pytest.mark.parametrize("way", ["autocast", "bf16 weights"])
def test_the_residual_stream_stays_in_fp32(way):
    jepa = small_jepa()
    exact = jepa(images_of(2), random_masks(1, 2, 2))
    if way == "bf16 weights":  # as under FSDP2's mixed precision: the buffers stay in fp32
        for parameter in jepa.parameters():
            parameter.data = parameter.data.bfloat16()
    streams, inner = [], []
    for block in [*jepa.encoder.blocks, *jepa.predictor.predictor_blocks]:
        block.register_forward_hook(lambda module, inputs, output: streams.extend([inputs[0].dtype, output.dtype]))
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
        block.norm1.register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        tokens = jepa.encoder(images_of(2))
        prediction = jepa(images_of(2), random_masks(1, 2, 2))
    assert set(streams) == {torch.float32} and set(inner) == {torch.bfloat16}
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(prediction.float(), exact, atol=0.1, rtol=0.1)  # 8 bits of mantissa, 4 blocks


def test_layer_norms_have_eps_1e_6():
    jepa = small_jepa(shake=0.0)
    norms = [module for module in jepa.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 * 2 + 2
    for norm in norms:
        x = torch.tensor([0.001, -0.001]).repeat(norm.normalized_shape[0] // 2)  # variance 1e-6, as large as eps
        torch.testing.assert_close(norm(x).abs(), torch.full_like(x, 0.5**0.5))


def test_a_block_compiles_whole():
    encoder, images = small_jepa().encoder, images_of(2)
    expected = encoder(images)
    torch._dynamo.reset()
    for block in encoder.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(encoder(images), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("build", "size"), [(build_encoder, "dept"), (build_predictor, "heds")])
def test_an_unknown_size_names_the_nearest(build, size):
    with pytest.raises(ConfigError, match=rf"{build.__name__} knows no '{size}'; did you mean (depth|heads)\?"):
        build("vit_tiny", **{size: 3})


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match="model.name is 'vit_hug'.*did you mean vit_huge"):
        build_encoder("vit_hug")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="model.width 192 isn't a multiple of 5 heads"):
        build_encoder("vit_tiny", heads=5)
    with pytest.raises(ConfigError, match="model.predictor_width 100 isn't a multiple of 3 heads"):
        build_predictor("vit_tiny", width=100)
    with pytest.raises(ValueError, match="width 16 doesn't divide into 3 heads; try width 15 or other heads"):
        VisionTransformer(grid=(2, 2), patch_size=4, width=16, depth=1, heads=3, mlp_width=32)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images are \(1, 3, 16, 16\); this encoder takes \(B, 3, 16, 24\): build"):
        small_jepa().encoder(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    "arguments", [{"keep": torch.zeros(1, 1, dtype=torch.int64), "last": 1}, {"index": torch.zeros(1)}]
)
def test_arguments_that_do_not_go_together_are_refused(arguments):
    with pytest.raises(ValueError, match="give keep, or index with its layout, or wanted, or last, or none of them"):
        small_jepa().encoder(images_of(1), **arguments)


@pytest.mark.parametrize("last", [0, 3])
def test_more_last_blocks_than_there_are_are_refused(last):
    with pytest.raises(ValueError, match=f"last is {last}; give 1 to 2, the encoder's blocks"):
        small_jepa().encoder.features(images_of(1), last=last)


def test_another_resolution_interpolates_the_position_embedding():
    encoder = small_jepa().encoder
    before = encoder.pos_embed.clone()
    encoder.set_image_size((32, 32))
    assert encoder.grid == (8, 8) and encoder.pos_embed.shape == (1, 64, 16)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 16)
    assert encoder.state_dict()["pos_embed"].shape == (1, 64, 16)
    encoder.set_image_size((16, 24))
    assert torch.equal(encoder.pos_embed, before)  # of the grid it was trained on, not interpolated twice
    with pytest.raises(ValueError, match=r"image size \(30, 30\) is not a multiple of patch size 4; try \(32, 32\)"):
        encoder.set_image_size(30)


def test_a_square_image_size_may_be_one_number():
    square = build_encoder("vit_tiny", depth=1, image_size=32)
    assert square.grid == (2, 2) and build_encoder("vit_tiny", depth=1, image_size=(32, 32)).grid == (2, 2)
    assert build_encoder("vit_tiny", width=16, depth=1, **SIZES).grid == (4, 6)

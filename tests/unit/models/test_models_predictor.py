import copy

import pytest
import torch
from torch._dynamo.utils import counters

from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.engine.parallelize import blocks, compile_blocks
from ijepa_scale.models import build_encoder, build_jepa, build_predictor, build_target
from tests.unit.models.packing_by_hand import (
    UNEVEN_CONTEXT,
    UNEVEN_TARGETS,
    images_of,
    pack_by_hand,
    random_masks,
    small_jepa,
)


def one_sequence(predictor, context, kept, asked):
    """The predictor's definition for one image, one context block and one target block."""
    positions = predictor.predictor_pos_embed[0]
    seen = predictor.predictor_embed(context) + positions[kept]
    x = torch.cat([seen, predictor.mask_token[0] + positions[asked]])[None]
    for block in predictor.predictor_blocks:
        x = block(x)
    return predictor.predictor_proj(predictor.predictor_norm(x))[0, len(kept) :]


def one_by_one(jepa, images, context, targets):
    """Predictions in the order (target block, context block, image), from one sequence at a time."""
    predictions = []
    for block in targets:
        for keep in context:
            for image, kept, asked in zip(images, keep, block, strict=True):
                kept, asked = torch.as_tensor(kept), torch.as_tensor(asked)
                encoded = jepa.encoder(image[None], kept[None])[0]
                predictions.append(one_sequence(jepa.predictor, encoded, kept, asked))
    return predictions


def same_gradients(jepa, got, expected, upstream):
    parameters = list(jepa.parameters())
    for (name, _), a, b in zip(
        jepa.named_parameters(),
        torch.autograd.grad(got, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("num_context", "num_targets"), [(1, 1), (1, 4), (2, 3)])
def test_dense_equals_one_sequence_at_a_time(num_context, num_targets):
    jepa, images = small_jepa(), images_of(3)
    masks = random_masks(num_context, num_targets, 3)
    got = jepa(images, masks)
    assert got.shape == (num_targets * num_context * 3, 3, 16)
    expected = torch.stack(one_by_one(jepa, images, masks.context, masks.targets))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    same_gradients(jepa, got, expected, torch.randn(got.shape, generator=torch.Generator().manual_seed(2)))


def test_one_context_block_needs_no_leading_dimension():
    jepa, images, masks = small_jepa(), images_of(3), random_masks(1, 2, 3)
    keep = masks.context[0]
    got = jepa.predictor(jepa.encoder(images, keep), keep, masks.targets)
    torch.testing.assert_close(got, jepa(images, masks))


@pytest.mark.parametrize("num_context", [1, 2])
def test_packed_equals_one_sequence_at_a_time(num_context):
    jepa, images = small_jepa(), images_of(3)
    context = [*UNEVEN_CONTEXT, [[1], [2, 3, 4], [0, 23]]][:num_context]
    got = jepa(images, pack_by_hand(context, UNEVEN_TARGETS))
    expected = torch.cat(one_by_one(jepa, images, context, UNEVEN_TARGETS))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    same_gradients(jepa, got, expected, torch.randn(got.shape, generator=torch.Generator().manual_seed(2)))


def test_dense_masks_packed_give_the_dense_result():
    jepa, images, masks = small_jepa(), images_of(3), random_masks(2, 2, 3)
    packed = pack_by_hand(masks.context.tolist(), masks.targets.tolist())
    torch.testing.assert_close(jepa(images, packed), jepa(images, masks).flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_get_no_views(packed):
    """If a block's input is a view, torch.compile fails by chance, or makes one more graph; see `Predictor._dense`."""
    jepa, images, masks = small_jepa(), images_of(3), random_masks(1, 2, 3)
    target = build_target(jepa)
    given: list[torch.Tensor] = []
    for block in (*blocks(jepa), *blocks(target)):
        block.register_forward_pre_hook(
            lambda _, args, named: given.extend(x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)),
            with_kwargs=True,
        )
    with torch.no_grad():
        target(images, wanted=masks.targets[0])
    jepa(images, pack_by_hand(masks.context.tolist(), masks.targets.tolist()) if packed else masks)
    assert len(given) == len(blocks(jepa)) + len(blocks(target)) + 2, "two last blocks get queries"
    assert not any(x._is_view() for x in given)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_need_two_graphs_per_role_whatever_the_lengths(packed):
    """One for a network's blocks, one for the last, of which only some tokens are wanted; the context needs one."""
    jepa, images = small_jepa(), images_of(3)
    target = build_target(jepa)
    eager, eager_target = copy.deepcopy(jepa), copy.deepcopy(target)
    torch._dynamo.reset()
    counters.clear()
    for part in (jepa, target):
        compile_blocks(part, backend="aot_eager")
    for count in range(2, 14):
        wanted = random_masks(1, 1, 3, kept=count).context[0]
        with torch.no_grad():
            torch.testing.assert_close(target(images, wanted=wanted), eager_target(images, wanted=wanted))
        masks = random_masks(1, 2, 3, kept=count)
        if packed:
            masks = pack_by_hand([[list(range(count)), [3, 4, 5], [0]]], UNEVEN_TARGETS)
        got, expected = jepa(images, masks), eager(images, masks)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        if count == 8:
            upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
            gradients = (torch.autograd.grad(got, list(jepa.parameters()), upstream),)
            gradients += (torch.autograd.grad(expected, list(eager.parameters()), upstream),)
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 + 1 + 2  # target, context, predictor


def test_predictor_inputs_that_do_not_fit_are_refused():
    predictor, masks = small_jepa().predictor, random_masks(2, 2, 3)
    packed = pack_by_hand(UNEVEN_CONTEXT, UNEVEN_TARGETS)
    for arguments in [{}, {"keep": masks.context}, {"keep": masks.context, "targets": masks.targets, "masks": packed}]:
        with pytest.raises(ValueError, match="needs either keep and targets, or packed masks; give one of the two"):
            predictor(torch.zeros(6, 7, 16), **arguments)
    with pytest.raises(ValueError, match=r"context \(3, 7, 16\) doesn't fit keep \(2, 3, 7\).*give \(E \* B, K, D\)"):
        predictor(torch.zeros(3, 7, 16), masks.context, masks.targets)


def test_another_grid_resamples_the_predictors_position_embedding():
    predictor = small_jepa().predictor
    predictor.set_grid((5, 5))
    assert predictor.predictor_pos_embed.shape == (1, 25, 8)


def test_a_jepa_has_the_weights_of_the_single_builders():
    config = ModelConfig(name="vit_tiny", image_size=32, depth=2, predictor_depth=1, predictor_width=24)
    jepa = build_jepa(config, seed=3)
    encoder = build_encoder("vit_tiny", image_size=32, depth=2, seed=3)
    predictor = build_predictor("vit_tiny", image_size=32, depth=1, width=24, seed=3)
    for ours, theirs in [(jepa.encoder, encoder), (jepa.predictor, predictor)]:
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert build_jepa(config, seed=3, device="meta").predictor.mask_token.is_meta


def test_the_target_is_a_frozen_copy():
    jepa = small_jepa()
    target = build_target(jepa)
    assert not any(parameter.requires_grad for parameter in target.parameters()) and not target.training
    assert all(parameter.requires_grad for parameter in jepa.parameters())
    assert torch.equal(target(images_of(1)), jepa.encoder(images_of(1)))
    with torch.no_grad():
        jepa.encoder.norm.weight += 1.0
    assert not torch.equal(target(images_of(1)), jepa.encoder(images_of(1)))

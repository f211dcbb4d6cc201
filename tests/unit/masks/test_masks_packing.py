"""Packed masks are what `PackedMasks` documents, checked by brute force for every token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MaskSampler, PackedMasks, pack
from ijepa_scale.masks.group import GroupMasks
from ijepa_scale.masks.packing import pack_groups, pack_indices


def check_by_brute_force(masks: PackedMasks, contexts: list, targets: list, patches: int) -> None:
    """Checks `masks` against the lists of patches, contexts [e][b] and targets [i][b], that they were made of."""
    num_images = len(contexts[0])
    order = list(itertools.product(range(len(targets)), range(len(contexts)), range(num_images)))

    index = [b * patches + p for block in contexts for b, kept in enumerate(block) for p in kept]
    assert masks.context_index.tolist() == index
    assert list(masks.context_layout.lengths) == [len(kept) for block in contexts for kept in block]
    assert masks.target_index.tolist() == [b * patches + p for i, _, b in order for p in targets[i][b]]

    # A token is (kind, context or target block, image, patch): the predictor's input must list them in order.
    tokens = [("context", e, b, p) for e, block in enumerate(contexts) for b, kept in enumerate(block) for p in kept]
    tokens += [("target", i, b, p) for i, _, b in order for p in targets[i][b]]
    expected, lengths, rows, weights = [], [], [], []
    for i, e, b in order:
        expected += [("context", e, b, p) for p in contexts[e][b]]
        rows += range(len(expected), len(expected) + len(targets[i][b]))
        expected += [("target", i, b, p) for p in targets[i][b]]
        lengths.append(len(contexts[e][b]) + len(targets[i][b]))
        weights += [1 / (len(order) * len(targets[i][b]))] * len(targets[i][b])
    assert [tokens[source] for source in masks.predictor_source.tolist()] == expected
    assert list(masks.predictor_layout.lengths) == lengths
    assert masks.predictor_layout.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert masks.target_rows.tolist() == rows
    assert sorted(set(masks.predictor_source.tolist())) == list(range(len(tokens)))
    torch.testing.assert_close(masks.weights, torch.tensor(weights))
    assert abs(float(masks.weights.double().sum()) - 1) < 1e-5
    for tensor in (masks.context_index, masks.target_index, masks.predictor_source, masks.target_rows):
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu" and tensor.is_contiguous()
    assert masks.weights.dtype == torch.float32


@st.composite
def ragged(draw):
    """Draws lists of different lengths: contexts [e][b], targets [i][b] with one length per image."""
    patches = draw(st.integers(4, 12))
    images, num_contexts, num_targets = (draw(st.integers(1, 3)) for _ in range(3))
    some = st.sets(st.integers(0, patches - 1), min_size=1).map(sorted)
    contexts = [[draw(some) for _ in range(images)] for _ in range(num_contexts)]
    sizes = [draw(st.integers(1, patches)) for _ in range(images)]
    targets = [[draw(st.permutations(range(patches)))[: sizes[b]] for b in range(images)] for _ in range(num_targets)]
    return patches, contexts, targets


@settings(max_examples=80, deadline=None)
@given(ragged())
def test_lists_of_any_lengths_become_the_documented_sequences(case) -> None:
    patches, contexts, targets = case

    def flat(lists):
        return np.array([p for block in lists for part in block for p in part], dtype=np.int64)

    def lengths(lists):
        return np.array([[len(part) for part in block] for block in lists])

    masks = pack_indices(flat(contexts), lengths(contexts), flat(targets), lengths(targets), patches)
    check_by_brute_force(masks, contexts, targets, patches)


@pytest.mark.parametrize("num_contexts", [1, 2])
def test_dense_masks_pack_to_the_same_tokens(num_contexts) -> None:
    config = BlockMaskConfig(num_context_blocks=num_contexts, group_size=5)
    dense = MaskSampler(config, (14, 14), seed=0)(2, 0, 5, 5)
    assert isinstance(dense, DenseMasks)
    check_by_brute_force(pack(dense, 196), dense.context.tolist(), dense.targets.tolist(), 196)


def test_groups_of_different_target_sizes_pack_in_the_order_of_their_images() -> None:
    sampler = MaskSampler(BlockMaskConfig(group_size=3), (14, 14), seed=0)
    parts = [sampler(4, start, min(3, 8 - start), 8) for start in (0, 3, 6)]
    assert len({part.targets.shape[2] for part in parts}) == 3
    contexts = [[row for part in parts for row in part.context[0].tolist()]]
    targets = [[row for part in parts for row in part.targets[i].tolist()] for i in range(4)]
    check_by_brute_force(sampler(4, 0, 8, 8), contexts, targets, 196)


def test_the_weighted_mean_over_a_mixed_pack_weighs_groups_by_their_images() -> None:
    sampler = MaskSampler(BlockMaskConfig(group_size=3), (14, 14), seed=0)
    loss = torch.rand(8, 196, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # per image and patch
    mixed = sampler(4, 0, 8, 8)
    packed = (loss.flatten()[mixed.target_index] * mixed.weights).sum()
    expected = 0.0
    for start, count in ((0, 3), (3, 3), (6, 2)):
        targets = sampler(4, start, count, 8).targets
        values = torch.stack([loss[start + b][targets[:, b]] for b in range(count)], dim=1)
        expected += values.mean() * count / 8
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)


def test_one_image_with_one_target_by_hand() -> None:
    context = np.zeros((1, 1, 6), dtype=bool)
    context[0, 0, [0, 5]] = True
    masks = pack_groups([GroupMasks(context, np.array([[[2, 3, 4]]]))])
    assert masks.context_index.tolist() == [0, 5]
    assert masks.target_index.tolist() == [2, 3, 4]
    assert masks.predictor_source.tolist() == [0, 1, 2, 3, 4]
    assert masks.target_rows.tolist() == [2, 3, 4]
    assert masks.predictor_layout.lengths == (5,)
    assert masks.weights.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("context", ["truncate", "packed"])
def test_all_tensors_of_masks_move_to_a_device(context) -> None:
    masks = MaskSampler(BlockMaskConfig(context=context), (14, 14), seed=0)(0, 0, 2, 2).map(lambda x: x.to("meta"))
    tensors = [value for value in vars(masks).values() if isinstance(value, torch.Tensor)]
    assert tensors and all(tensor.device.type == "meta" for tensor in tensors)

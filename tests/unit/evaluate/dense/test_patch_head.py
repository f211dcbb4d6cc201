"""The linear layer on patch tokens and its losses, against values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from ijepa_scale.evaluate.dense.dense_protocols import likeliest
from ijepa_scale.evaluate.dense.patch_head import (
    HeadRecipe,
    PatchHead,
    binned_depth,
    depth_loss,
    fit_head,
    mask_loss,
    upsampled,
)

GRID = (2, 3)


def test_values_at_patches_are_upsampled_row_by_row():
    values = torch.arange(6.0).reshape(1, 6, 1)
    expected = interpolate(torch.arange(6.0).reshape(1, 1, 2, 3), (4, 6), mode="bilinear", align_corners=False)
    assert torch.equal(upsampled(values, GRID, (4, 6)), expected)


def test_pixels_without_a_class_cost_nothing():
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    known = masks.clone()
    known[0] = 255
    assert torch.allclose(mask_loss(scores, known), cross_entropy(scores[1:], masks[1:].long()))
    assert mask_loss(scores, torch.full_like(masks, 255)) == 0.0


def test_a_depth_is_the_mean_of_the_bins_weighted_by_positive_scores():
    scores = torch.tensor([[[-5.0, 0.9, -1.0, 1.9]]])  # weights 0.1, 1, 0.1, 2
    assert binned_depth(scores, 0.0, 8.0).item() == pytest.approx((0.1 * 1 + 1 * 3 + 0.1 * 5 + 2 * 7) / 3.2)


def test_the_depth_loss_by_hand():
    found = torch.tensor([1.0, 2.0, 9.0, 4.0]).reshape(1, 1, 2, 2)
    maps = torch.tensor([1.0, 1.0, float("nan"), 1.0]).reshape(1, 2, 2)
    gaps = np.log([1.0, 2.0, 4.0])
    expected = np.sqrt((gaps**2).mean() - 0.85 * gaps.mean() ** 2 + 1e-6)
    assert depth_loss(found, maps).item() == pytest.approx(expected, rel=1e-5)


def test_the_likeliest_class_is_the_same_part_by_part(monkeypatch):
    scores = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(0))
    whole = likeliest(scores, GRID, (9, 10))
    assert np.array_equal(whole, upsampled(scores, GRID, (9, 10))[0].argmax(dim=0))
    monkeypatch.setattr("ijepa_scale.evaluate.dense.dense_protocols._SCORES_AT_ONCE", 2 * 90)
    assert np.array_equal(likeliest(scores, GRID, (9, 10)), whole)


def test_a_head_learns_the_classes_of_its_patches_and_repeats():
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 3, (40, 6))
    tokens = generator.normal(size=(40, 6, 8))
    tokens[..., :3] += 3 * np.eye(3)[classes]
    maps = classes.reshape(40, 2, 3).repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)
    heads = []
    for _ in range(2):
        head = PatchHead(8, 3, seed=1)
        fit_head(head, tokens.astype(np.float16), maps, lambda outputs: outputs, mask_loss, grid=GRID,
                 recipe=HeadRecipe(epochs=40, seed=1), name="test")  # fmt: skip
        heads.append(head)
    assert all(torch.equal(*both) for both in zip(*(head.state_dict().values() for head in heads), strict=True))
    found = heads[0](torch.from_numpy(tokens).float()).argmax(dim=2).numpy()
    assert not heads[0].training and (found == classes).mean() > 0.9


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (30, 4), (200, 10), (5000, 16)])
def test_a_small_set_has_small_batches(count, batch):
    assert HeadRecipe().batch_of(count) == batch
    assert HeadRecipe(batch_size=2).batch_of(count) == min(count, 2)

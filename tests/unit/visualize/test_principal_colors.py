"""Patch features as colours: the components, the threshold and the sharpening, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from ijepa_scale.errors import DataError
from ijepa_scale.visualize.principal_colors import components, otsu, principal_colors, sharpened

SEEDS = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objects(seed: int, images: int = 3, side: int = 9, width: int = 12) -> tuple[Tensor, Tensor]:
    """Returns features (B, H, W, D) of squares on a background, and which patches are on a square."""
    mask = torch.zeros(images, side, side, dtype=torch.bool)
    mask[:, 2:6, 3:7] = True
    noise = 0.05 * drawn(seed, images, side, side, width)
    return noise + 3 * mask[..., None] * drawn(seed + 1, width), mask


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_components_are_those_of_scikit_learn(seed: int) -> None:
    flat = drawn(seed, 60, 8).double() * torch.linspace(1, 3, 8)
    ours, theirs = components(flat, flat, 3).numpy(), PCA(3, svd_solver="full").fit_transform(flat.numpy())
    for column in range(3):
        assert min(np.abs(ours[:, column] - sign * theirs[:, column]).max() for sign in (1, -1)) < 1e-8


@given(SEEDS, st.floats(1.5, 6.0), st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_otsus_threshold_separates_best(seed: int, distance: float, share: float) -> None:
    values = drawn(seed, 400).double()
    values[: int(400 * share)] += distance

    def between(level: float) -> float:
        low, high = values[values <= level], values[values > level]
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max(between(float(level)) for level in values)
    assert between(otsu(values)) > 0.99 * best


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_foreground_is_what_stands_in_the_middle(seed: int) -> None:
    tokens, mask = objects(seed)
    _, foreground = principal_colors(tokens)
    assert torch.equal(foreground > 0.5, mask)
    _, turned = principal_colors(-tokens)  # components have no sign of their own
    assert torch.equal(turned > 0.5, mask)


def test_colours_are_the_same_over_all_images_and_show_the_parts() -> None:
    tokens, mask = objects(0)
    part = torch.zeros_like(mask)
    part[:, 2:4] = mask[:, 2:4]
    tokens = tokens + part[..., None] * drawn(7, 12)
    colors, _ = principal_colors(torch.cat([tokens, tokens[:1]]))
    assert torch.equal(colors[0], colors[-1])
    assert 0 <= colors.min() and colors.max() <= 1
    red = colors[:3, 0]
    assert abs(float(red[part].mean() - red[mask & ~part].mean())) > 0.7  # the first component tells the parts apart


@pytest.mark.parametrize("tokens", [torch.ones(2, 4, 4, 6), torch.full((2, 4, 4, 6), math.nan)])
def test_collapsed_features_are_refused(tokens: Tensor) -> None:
    with pytest.raises(DataError, match="all 32 patches are the same or not finite.*has collapsed"):
        principal_colors(tokens)


def test_sharpening_equals_its_formula() -> None:
    maps, guide = drawn(3, 2, 2, 3, 4), torch.rand(2, 3, 6, 12, generator=torch.Generator().manual_seed(4))
    found = sharpened(maps, guide, radius=1, spatial=0.8, similarity=0.3)
    coarse = torch.nn.functional.interpolate(guide, size=(3, 4), mode="area")
    for b, row, column in ((0, 0, 0), (0, 3, 7), (1, 5, 11), (1, 2, 4)):
        y, x = (row + 0.5) / 2 - 0.5, (column + 0.5) / 3 - 0.5
        total, weights = torch.zeros(2), 0.0
        for i in range(3):
            for j in range(4):
                if abs(i - round(y)) <= 1 and abs(j - round(x)) <= 1:
                    distance = (i - y) ** 2 + (j - x) ** 2
                    unlike = float((coarse[b, :, i, j] - guide[b, :, row, column]).square().sum())
                    weight = math.exp(-distance / 1.28 - unlike / 0.18)
                    total, weights = total + weight * maps[b, :, i, j], weights + weight
        torch.testing.assert_close(found[b, :, row, column], total / weights, atol=1e-4, rtol=1e-4)


def test_sharpening_follows_edges_inside_patches() -> None:
    guide = torch.zeros(1, 3, 32, 32)
    guide[..., 13:] = 1.0  # patches are 8 pixels wide: the edge is inside the second
    maps = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 1, 4, 4)
    found = sharpened(maps, guide)[0, 0, 16]
    assert found[12] < 0.1 and found[14] > 0.9
    torch.testing.assert_close(sharpened(torch.full((1, 1, 4, 4), 0.3), guide), torch.full((1, 1, 32, 32), 0.3))

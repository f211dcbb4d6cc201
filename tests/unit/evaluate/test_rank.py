"""RankMe and LiDAR against values that can be computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_scale.evaluate.rank import lidar, rank_me


def test_rank_me_of_features_along_known_axes():
    assert rank_me(torch.eye(8)) == pytest.approx(8, rel=1e-5)
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, rel=1e-4)  # collapsed to one point
    assert rank_me(torch.zeros(50, 8)) == pytest.approx(1, rel=1e-4)
    singular = torch.tensor([3.0, 1.0])  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_me(torch.diag(singular)) == pytest.approx(math.exp(entropy), rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    rotated = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert rank_me(torch.diag(singular) @ rotated[:2]) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_lidar_by_hand():
    """Two axes tell 4 images apart, three times as far along the first; views scatter by 1 along both."""
    means = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    views = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    features = means[:, None] + views[None]
    between = torch.tensor([12.0, 4 / 3])  # sum of squares over n - 1
    within = 4 / 3 + 1e-4  # 16 squares over 4 x 3, the same along both
    shares = between / within / (between / within).sum()
    expected = math.exp(-(shares * shares.log()).sum())
    assert lidar(features) == pytest.approx(expected, rel=1e-5)


def test_lidar_ignores_axes_along_which_only_views_differ():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(64, 1, 16, generator=generator)
    means[..., 4:] = 0
    features = means + 0.1 * torch.randn(64, 8, 16, generator=generator)
    assert 3 < lidar(features) < 5
    assert rank_me(features.flatten(0, 1)) > 7  # which counts them
    collapsed = torch.ones(64, 8, 16) + 1e-9 * torch.randn(64, 8, 16, generator=generator)
    assert lidar(collapsed) >= 1


def test_one_view_is_not_enough():
    with pytest.raises(ValueError, match="64 images with 1 views; LiDAR needs at least 2 of both"):
        lidar(torch.zeros(64, 1, 16))

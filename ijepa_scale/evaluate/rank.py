"""How many dimensions features use: RankMe and LiDAR, which need no labels. Knows nothing of models or images."""

from __future__ import annotations

import torch
from torch import Tensor

_LIDAR_DELTA = 1e-4  # added to the scatter within images
_EPSILON = 1e-7  # added to each share


def rank_me(features: Tensor) -> float:
    """Returns RankMe of features (N, D): the exponential of the entropy of their normalised singular values.

    It is from 1 (all features lie on one line, or are equal) to min(N, D), so compare only equal N. The features aren't
    centred. Computed in float64. Synchronises.

    Source: arXiv 2210.02885.
    """
    values = torch.linalg.svdvals(features.double())
    return _effective(values)


def lidar(features: Tensor, delta: float = _LIDAR_DELTA) -> float:
    """Returns LiDAR of features (N, Q, D) of Q views of N images: the effective rank of what tells images apart.

    It is the exponential of the entropy of the eigenvalues of W^-1/2 B W^-1/2, where B is the scatter between the
    images' means and W, plus `delta` on its diagonal, that of the views around them; from 1 to min(N - 1, D). Computed
    in float64. Synchronises.

    Source: arXiv 2312.04000.

    Raises:
        ValueError: fewer than 2 images or 2 views.
    """
    count, views, width = features.shape
    if count < 2 or views < 2:
        raise ValueError(f"{count} images with {views} views; LiDAR needs at least 2 of both")
    features = features.double()
    means = features.mean(dim=1)
    between = (means - means.mean(dim=0)).div_((count - 1) ** 0.5)
    within = (features - means[:, None]).flatten(0, 1).div_((count * (views - 1)) ** 0.5)
    spread, axes = torch.linalg.eigh(
        within.T @ within + delta * torch.eye(width, dtype=within.dtype, device=within.device)
    )
    whitened = between @ axes / spread.sqrt()
    return _effective(torch.linalg.svdvals(whitened).square())


def _effective(values: Tensor) -> float:
    """Returns the exponential of the entropy of non-negative values (K,), as shares of their sum."""
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + _EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))

"""Patch features as colours: principal components of the foreground, the same for all images. Pure functions.

Shapes: B images of H x W patches, D channels; N = B * H * W patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_scale.errors import DataError

_COVERED = (0.02, 0.98)  # quantiles of a component that get the darkest and the brightest colour
_SOFT = 0.1  # width of the foreground's edge, in standard deviations of the first component


def principal_colors(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns colours (B, 3, H, W) in [0, 1] and how much each patch is foreground (B, H, W) in [0, 1].

    `tokens` is (B, H, W, D), float. The first principal component of all patches separates foreground from background
    at Otsu's threshold; background is the side that holds more of the images' borders. The first three components of
    the foreground's patches are red, green and blue.

    Raises:
        DataError: all features are the same, or not finite.

    Source: the method of figure 1 of arXiv 2304.07193, with Otsu's threshold instead of one by hand.
    """
    flat = tokens.flatten(0, 2).double()
    if not flat.isfinite().all() or float(flat.std(dim=0).max()) < 1e-9:
        raise DataError(
            f"the features of all {len(flat)} patches are the same or not finite, so they have no components: the "
            "encoder has collapsed; take an earlier checkpoint"
        )
    score = components(flat, flat, 1)[:, 0]
    score = score / score.std()
    level = otsu(score)
    grid = (score > level).unflatten(0, tokens.shape[:3]).double()
    border = torch.cat([grid[:, 0], grid[:, -1], grid[:, :, 0], grid[:, :, -1]], dim=1)
    if border.mean() > grid.mean():
        score, level = -score, -level
    foreground = torch.sigmoid((score - level) / _SOFT)
    chosen = flat[score > level]
    colors = components(flat, chosen, 3)
    quantiles = torch.tensor(_COVERED, dtype=colors.dtype, device=colors.device)
    low, high = torch.quantile(colors[score > level][:: max(1, len(chosen) // 100_000)], quantiles, dim=0)
    colors = ((colors - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colors.unflatten(0, tokens.shape[:3]).permute(0, 3, 1, 2).float(), foreground.view(tokens.shape[:3]).float()


def components(flat: Tensor, fitted: Tensor, count: int) -> Tensor:
    """Returns the first `count` principal components (N, count) of `flat` (N, D), fitted to `fitted` (M, D).

    Signs are fixed: the largest weight of each component is positive. Fewer channels than `count` give zeros.
    """
    mean = fitted.mean(dim=0)
    centred = fitted - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    vectors = vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    found = (flat - mean) @ (vectors * largest.sign())
    return F.pad(found, (0, count - found.shape[1]))


def otsu(values: Tensor, bins: int = 256) -> float:
    """Returns the threshold that separates `values` (N,) best into two classes.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979: the largest variance between classes.
    """
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values.cpu(), bins, low, high).double()
    width = (high - low) / bins
    centres = low + width * (torch.arange(bins, dtype=torch.float64) + 0.5)
    below, total = counts.cumsum(0), counts.sum()
    sums = (counts * centres).cumsum(0)
    above = total - below
    means = sums / below.clamp_min(1), (sums[-1] - sums) / above.clamp_min(1)
    between = below * above * (means[0] - means[1]).square()
    best = (between == between.max()).nonzero().double().mean()  # the middle of an empty stretch
    return low + width * (float(best) + 1)


def sharpened(
    maps: Tensor, guide: Tensor, *, radius: int = 2, spatial: float = 0.8, similarity: float = 0.08
) -> Tensor:
    """Returns maps of patches (B, C, rows, columns) for each pixel, (B, C, h, w), with the edges of `guide`.

    `guide` is (B, 3, h, w) in [0, 1]. A pixel takes the mean of the patches around it, weighted by how near they are
    (`spatial`, standard deviation in patches) and how alike their mean colours are to the pixel's (`similarity`).

    Source: Kopf et al., "Joint bilateral upsampling", 2007, equation 3.
    """
    rows, columns = maps.shape[2:]
    height, width = guide.shape[2:]
    coarse = F.interpolate(guide, size=(rows, columns), mode="area")
    y, x = ((torch.arange(n, device=maps.device) + 0.5) * m / n - 0.5 for n, m in ((height, rows), (width, columns)))
    total = maps.new_zeros(maps.shape[0], maps.shape[1], height, width)
    weights = maps.new_zeros(maps.shape[0], 1, height, width)
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            row, column = y.round().long() + down, x.round().long() + right
            inside = ((0 <= row) & (row < rows))[:, None] & ((0 <= column) & (column < columns))[None]
            distance = (row - y).square()[:, None] + (column - x).square()[None]
            row, column = row.clamp(0, rows - 1)[:, None], column.clamp(0, columns - 1)[None]
            unlike = (coarse[:, :, row, column] - guide).square().sum(dim=1, keepdim=True)
            exponent = -distance / (2 * spatial**2) - unlike / (2 * similarity**2)
            weight = (exponent.exp() + 1e-8 * (-distance).exp()) * inside  # where no colour is alike, the nearest count
            total += weight * maps[:, :, row, column]
            weights += weight
    return total / weights

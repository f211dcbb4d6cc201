"""Trains one linear layer on stored patch tokens, for answers at every pixel. Knows nothing of files or of figures.

Shapes: B images, P patches, D channels of a token, O outputs, (h, w) the size of the encoder's images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from ijepa_scale import rng
from ijepa_scale.evaluate.dense.map_files import IGNORED

_INIT_STD = 0.01
_BATCH, _LEAST_BATCH, _STEPS = 16, 4, 20  # images, and steps of an epoch
_WARM_UP = 1500 / 40_000  # of the steps. Source: arXiv 2304.07193, the segmentation settings in its public code
_LEAST = 0.1  # added to the score of each bin. Source: arXiv 2011.14141's public code, norm "linear"
_CENTRE_WEIGHT, _EPS = 0.15, 1e-6  # of the scale-invariant loss. Source: arXiv 2011.14141: 1 - 0.85

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, O, h, w), maps (B, h, w) -> ()


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """How the linear layer is trained: AdamW, a linear warm-up, then a linear decay to 0."""

    epochs: int = 50
    batch_size: int | None = None  # images; None: 16, or fewer if an epoch had less than 20 steps, but at least 4
    lr: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0

    def batch_of(self, count: int) -> int:
        """Returns the images of a batch, of `count` in all."""
        return min(count, self.batch_size or min(_BATCH, max(_LEAST_BATCH, count // _STEPS)))


class PatchHead(nn.Module):
    """BatchNorm and a linear layer, the same for each patch, drawn from `seed`."""

    def __init__(self, width: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, outputs)
        nn.init.normal_(self.linear.weight, std=_INIT_STD, generator=rng.generator(seed, "patch-head"))
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the outputs (B, P, O) of tokens (B, P, D)."""
        return self.linear(self.norm(tokens.flatten(0, 1))).unflatten(0, tokens.shape[:2])


def fit_head(
    head: PatchHead,
    tokens: np.ndarray,
    maps: np.ndarray,
    at_patches: Callable[[Tensor], Tensor],
    loss: Loss,
    *,
    grid: tuple[int, int],
    recipe: HeadRecipe,
    name: str,
) -> None:
    """Trains a head, in place and on its device, and freezes it.

    Tokens (N, P, D) and maps (N, h, w) may be memory-mapped. `at_patches` maps the head's outputs (B, P, O) to values
    at patches, which are upsampled to (h, w) for the loss. The order of the images is keyed by seed and epoch; an epoch
    drops the rest of N / batch.
    """
    device = head.linear.weight.device
    size = recipe.batch_of(len(tokens))
    steps = recipe.epochs * (len(tokens) // size)
    warm = max(1, round(_WARM_UP * steps))
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    head.train()
    step = 0
    with tqdm(total=steps, unit="step", desc=name, disable=None, dynamic_ncols=True) as bar:
        for epoch in range(recipe.epochs):
            order = rng.permutation(len(tokens), recipe.seed, "patch-head-order", epoch)
            for begin in range(0, len(order) - size + 1, size):
                ids = np.sort(order[begin : begin + size])
                step += 1
                optimizer.param_groups[0]["lr"] = recipe.lr * min(step / warm, (steps - step + 1) / (steps - warm + 1))
                values = at_patches(head(on_device(tokens[ids], device)))
                answers = torch.from_numpy(np.array(maps[ids])).to(device)
                optimizer.zero_grad()
                loss(upsampled(values, grid, (maps.shape[1], maps.shape[2])), answers).backward()
                optimizer.step()
                bar.update()
    head.eval().requires_grad_(False)


def on_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    """Returns stored tokens in float32 on a device."""
    return torch.from_numpy(np.array(tokens)).to(device).float()


def upsampled(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Returns values at patches (B, P, O) interpolated bilinearly to pixels, (B, O, h, w)."""
    return interpolate(values.transpose(1, 2).unflatten(2, grid), size, mode="bilinear", align_corners=False)


def mask_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Returns the mean cross-entropy () of scores (B, C, h, w) over the pixels that have a class in masks (B, h, w)."""
    total = cross_entropy(scores, masks.long(), ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def binned_depth(scores: Tensor, lowest: float, highest: float) -> Tensor:
    """Returns the depths (B, P, 1) of patches from scores (B, P, O) of O bins of equal width.

    A depth is the mean of the bins' centres, weighted by the scores where they are positive.

    Source: AdaBins, arXiv 2011.14141, section 3, with fixed bins as in arXiv 2304.07193, section 7.4.
    """
    edges = torch.linspace(lowest, highest, scores.shape[-1] + 1, device=scores.device)
    weights = scores.relu() + _LEAST
    return ((weights / weights.sum(dim=-1, keepdim=True)) @ ((edges[1:] + edges[:-1]) / 2))[..., None]


def depth_loss(depths: Tensor, maps: Tensor) -> Tensor:
    """Returns the scale-invariant loss () of depths (B, 1, h, w) over the pixels that have one in maps (B, h, w).

    Source: Eigen et al., arXiv 1406.2283, equation 4, with the root and the weight of arXiv 2011.14141.
    """
    known = maps.isfinite()
    count = known.sum().clamp(min=1)
    gaps = torch.where(known, depths[:, 0].log() - torch.where(known, maps, 1.0).log(), 0.0)
    mean = gaps.sum() / count
    variance = (gaps**2).sum() / count - mean**2
    return (variance.clamp(min=0.0) + _CENTRE_WEIGHT * mean**2 + _EPS).sqrt()

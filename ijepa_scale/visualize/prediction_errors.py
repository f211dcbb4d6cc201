"""How far the predictor is from the target at each patch of an image, over many masks. Must not know training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.types import target_index
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.targets import normalise_targets, select_targets

_TOGETHER = 16  # masks of one forward pass


@dataclass(frozen=True, kw_only=True)
class PatchErrors:
    """Squared errors of one image, means over channels, of features normalised as the objective normalises them.

    Attributes:
        mean: (rows, columns) float32 on the CPU, mean over the masks that have the patch as a target; NaN without one.
        draws: (rows, columns) int64: how often each was predicted.
        baseline: the error of the mean of the image's own target features, a constant prediction.
    """

    mean: Tensor
    draws: Tensor
    baseline: float


@torch.no_grad()
def patch_errors(jepa: JEPA, target: VisionTransformer, image: Tensor, sampler: MaskSampler, draws: int) -> PatchErrors:
    """Returns the errors on `image` (C, h, w) over `draws` masks, those of steps 0, 1, ... of training."""
    patches = target.grid[0] * target.grid[1]
    wanted = normalise_targets(target(image[None]))  # (1, N, D)
    baseline = (wanted - wanted.mean(dim=1, keepdim=True)).square().mean()
    total = torch.zeros(patches, dtype=torch.float64)
    counts = torch.zeros(patches, dtype=torch.int64)
    for step, begin in enumerate(range(0, draws, _TOGETHER)):
        batch = min(_TOGETHER, draws - begin)
        masks = sampler(step, 0, batch, batch)
        index = target_index(masks, patches)
        moved = masks.map(lambda tensor: tensor.to(image.device))
        predicted = jepa(image.expand(batch, -1, -1, -1), moved)
        expected = select_targets(wanted.expand(batch, -1, -1), index.to(image.device), moved)
        errors = (predicted.float() - expected).square().mean(dim=-1).flatten().double().cpu()
        total.index_add_(0, index % patches, errors)
        counts.index_add_(0, index % patches, torch.ones_like(index))
    mean = torch.where(counts > 0, total / counts.clamp_min(1), float("nan")).float()
    return PatchErrors(mean=mean.view(target.grid), draws=counts.view(target.grid), baseline=float(baseline))

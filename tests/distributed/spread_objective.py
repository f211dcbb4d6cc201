"""An objective from outside the package with a statistic over images, which it can gather over the processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather

from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.objectives.targets import mean_over_images, normalise_targets, select_targets
from ijepa_scale.registry import OBJECTIVES


class SpreadConfig(ObjectiveConfig):
    """Absolute error, and a penalty where the images' features are alike."""

    gather: bool = True


@OBJECTIVES.register("spread")
class Spread:
    """The penalty is one minus the standard deviation of the predictions' means over the images."""

    Config = SpreadConfig

    def __init__(self, config, *, fused=False):
        self.gather = config.gather

    def __call__(self, prediction, tokens, masks, wanted):
        target = select_targets(normalise_targets(tokens), wanted.rows, masks)
        error = mean_over_images((prediction.float() - target).abs().mean(dim=-1), masks)
        means = prediction.float().unflatten(0, (-1, len(tokens))).mean(dim=(0, 2))  # (B, D)
        if self.gather and dist.is_initialized():
            means = torch.cat(all_gather(means))
        return error + (1 - (means.var(dim=0, correction=0) + 1e-4).sqrt()).mean()

"""The objective `cosine`: cosine distance between predicted and target features."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.masks import Masks, Wanted
from ijepa_scale.objectives.targets import check_shapes, mean_over_images, normalise_targets, select_targets


class CosineConfig(ObjectiveConfig):
    """One minus the cosine of the angle between prediction and normalised target, averaged over the target tokens."""

    loss: str = Field("cosine", description="Distance of predicted from target features.")


class Cosine:
    """Distance 0 for features of the same direction, 1 for orthogonal ones, 2 for opposite ones."""

    Config = CosineConfig

    def __init__(self, config: CosineConfig, *, fused: bool = False) -> None:
        """The section has no settings besides the name, and there is no fused kernel."""

    def __call__(self, prediction: Tensor, tokens: Tensor, masks: Masks, wanted: Wanted) -> Tensor:
        """Returns the mean distance.

        Raises:
            ValueError: the shapes of prediction and targets differ.
        """
        target = select_targets(normalise_targets(tokens), wanted.rows, masks)
        check_shapes(prediction, target)
        return mean_over_images(1 - F.cosine_similarity(prediction.float(), target, dim=-1), masks)

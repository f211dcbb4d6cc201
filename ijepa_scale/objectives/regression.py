"""The objectives `smooth_l1` and `l2`: regression of the normalised target features.

Source: arXiv 2301.08243, equation 1 (l2); smooth_l1 with beta 1 is the loss of the released code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels.target_loss import target_loss
from ijepa_scale.config import RegressionConfig
from ijepa_scale.masks import Masks, PackedMasks, Wanted
from ijepa_scale.objectives.targets import (
    TARGET_NORM_EPS,
    check_shapes,
    mean_over_images,
    normalise_targets,
    select_targets,
)


class Regression:
    """`smooth_l1`: quadratic below `beta`, linear above; `l2`: the squared error. Both are means over all elements."""

    Config = RegressionConfig

    has_fused_kernel = True

    def __init__(self, config: RegressionConfig, *, fused: bool = False) -> None:
        """With `fused`, one Triton kernel does normalisation, selection, loss and gradient (CUDA only)."""
        self._config = config
        self._fused = fused

    def __call__(self, prediction: Tensor, tokens: Tensor, masks: Masks, wanted: Wanted) -> Tensor:
        """Returns the loss.

        Raises:
            ValueError: the shapes of prediction and targets differ, or the fused kernel can't run here.
        """
        if self._fused:
            return self._in_one_pass(prediction, tokens, masks, wanted)
        return self.compare(prediction, select_targets(normalise_targets(tokens), wanted.rows, masks), masks)

    def compare(self, prediction: Tensor, target: Tensor, masks: Masks) -> Tensor:
        """Returns the loss for targets that are already normalised and in the predictor's order.

        Raises:
            ValueError: the shapes differ.
        """
        check_shapes(prediction, target)
        prediction, target = prediction.float(), target.float()
        if self._config.loss == "smooth_l1":
            elements = F.smooth_l1_loss(prediction, target, reduction="none", beta=self._config.beta)
        else:
            elements = F.mse_loss(prediction, target, reduction="none")
        if isinstance(masks, PackedMasks):
            return mean_over_images(elements.mean(dim=-1), masks)
        return elements.mean()  # one reduction instead of two: all images have the same number of elements

    def _in_one_pass(self, prediction: Tensor, tokens: Tensor, masks: Masks, wanted: Wanted) -> Tensor:
        """Returns the same loss without storing normalised or selected copies of the tokens."""
        return target_loss(
            prediction.flatten(0, -2),
            tokens.flatten(0, 1),
            wanted.rows,
            masks.weights if isinstance(masks, PackedMasks) else None,
            beta=self._config.beta,
            eps=TARGET_NORM_EPS,
            loss=self._config.loss,
            implementation="triton",
        )

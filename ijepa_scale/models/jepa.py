"""Encoder and predictor as one trainable module: one engine, one backward."""

from __future__ import annotations

from torch import Tensor, nn

from ijepa_scale.masks.types import Masks, PackedMasks
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer


class JEPA(nn.Module):
    """The part of I-JEPA that is trained by gradients. The target encoder is a separate module.

    Source: arXiv 2301.08243, figure 3.
    """

    def __init__(self, encoder: VisionTransformer, predictor: Predictor) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(self, images: Tensor, masks: Masks) -> Tensor:
        """Returns the predicted target features of images (B, 3, H, W).

        They are (M * E * B, T, D) for dense masks and (R, D) for packed masks, in the row order of
        `objectives.targets.select_targets`.
        """
        if isinstance(masks, PackedMasks):
            context = self.encoder(images, index=masks.context_index, layout=masks.context_layout)
            return self.predictor(context, masks=masks)
        context = self.encoder(images, masks.context)
        return self.predictor(context, masks.context, masks.targets)

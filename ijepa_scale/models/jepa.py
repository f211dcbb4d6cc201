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

    def forward(self, images: Tensor, masks: Masks, with_context: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the predicted target features of images (B, 3, H, W).

        They are (M * E * B, T, D) for dense masks and (R, D) for packed masks, in the row order of
        `objectives.targets.select_targets`. `with_context` adds the context encoder's tokens, (E * B, K, D) or (C, D).
        """
        if isinstance(masks, PackedMasks):
            context = self.encoder(images, index=masks.context_index, layout=masks.context_layout)
            prediction = self.predictor(context, masks=masks)
        else:
            context = self.encoder(images, masks.context)
            prediction = self.predictor(context, masks.context, masks.targets)
        return (prediction, context) if with_context else prediction

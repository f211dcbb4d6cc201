"""From the target encoder's tokens to what is predicted, and from errors to one number.

Shapes: B images, U target tokens per image, D channels, E context blocks, M target blocks of T tokens, R target
tokens in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_scale.masks import Masks, PackedMasks

TARGET_NORM_EPS = 1e-5


@torch.no_grad()
def normalise_targets(tokens: Tensor) -> Tensor:
    """Returns the target encoder's tokens (B, U, D), each normalised over its channels, fp32; without affine, eps 1e-5.

    Source: the released I-JEPA code's behaviour (the paper doesn't mention this norm).
    """
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=TARGET_NORM_EPS)


@torch.no_grad()
def select_targets(features: Tensor, rows: Tensor, masks: Masks) -> Tensor:
    """Returns the features to predict, in the predictor's order: (M * E * B, T, D), or (R, D) if packed.

    `features` are (B, U, D), of all patches or of some, and `rows` (R,) int64 are indices of the targets in
    the flattened (B * U): see `Wanted` and, for all patches, `target_index`.
    """
    chosen = features.flatten(0, 1).index_select(0, rows)
    return chosen if isinstance(masks, PackedMasks) else chosen.view(-1, masks.targets.shape[2], chosen.shape[-1])


def check_shapes(prediction: Tensor, target: Tensor) -> None:
    """Compares the shapes of both.

    Raises:
        ValueError: they differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape; "
            "take both from the same masks"
        )


def mean_over_images(errors: Tensor, masks: Masks) -> Tensor:
    """Returns the mean of the tokens' errors, (M * E * B, T) or (R,), in which every image and block counts alike."""
    return (errors * masks.weights).sum() if isinstance(masks, PackedMasks) else errors.mean()

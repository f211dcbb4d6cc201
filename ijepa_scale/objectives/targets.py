"""What objectives share: target normalisation, target selection and the mean of errors. Must not know any loss.

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
    """Returns the target encoder's tokens (B, U, D) in fp32, each normalised over its channels (eps 1e-5, no affine).

    Source: the released I-JEPA code's behaviour (the paper doesn't mention this norm).
    """
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=TARGET_NORM_EPS)


@torch.no_grad()
def select_targets(features: Tensor, rows: Tensor, masks: Masks) -> Tensor:
    """Returns the features to predict, in the predictor's order: (M * E * B, T, D), or (R, D) if packed.

    `features` is (B, U, D), for all patches or for some of them. `rows` (R,) int64 is the index of each target in
    the flattened (B * U): `Wanted.rows`, or `target_index` if the features cover all patches.
    """
    chosen = features.flatten(0, 1).index_select(0, rows)
    return chosen if isinstance(masks, PackedMasks) else chosen.view(-1, masks.targets.shape[2], chosen.shape[-1])


def check_shapes(prediction: Tensor, target: Tensor) -> None:
    """Checks that both shapes are equal.

    Raises:
        ValueError: they differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape; "
            "compute both from the same masks"
        )


def mean_over_images(errors: Tensor, masks: Masks) -> Tensor:
    """Returns the mean of the tokens' errors, (M * E * B, T) or (R,), with equal weight for every image and block."""
    return (errors * masks.weights).sum() if isinstance(masks, PackedMasks) else errors.mean()

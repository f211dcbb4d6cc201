"""Targets and loss of I-JEPA. Floor 2: tensors in, a scalar out; knows no model and no process.

Shapes: B images, N patches, D channels, E context blocks, M target blocks of T tokens, R packed target tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_scale.config.schema import ObjectiveConfig
from ijepa_scale.masks.types import Masks, PackedMasks

TARGET_NORM_EPS = 1e-5


@torch.no_grad()
def jepa_targets(tokens: Tensor, masks: Masks) -> Tensor:
    """Returns the features to predict, fp32, rows as the predictor's: (M * E * B, T, D), or (R, D) if packed.

    Each of the target encoder's tokens (B, N, D) is normalised over its channels, without affine, eps 1e-5.

    Source: the released I-JEPA code's behaviour (the paper doesn't mention this norm).
    """
    num_images, num_patches, width = tokens.shape
    if isinstance(masks, PackedMasks):
        index = masks.target_index
    else:
        num_targets, _, num_predicted = masks.targets.shape
        offsets = torch.arange(num_images, device=tokens.device)[:, None] * num_patches
        places = (masks.targets + offsets)[:, None]
        index = places.expand(-1, masks.context.shape[0], -1, -1).flatten()
    # Gathered first: the norm of a token doesn't depend on the others, and most of them aren't targets.
    chosen = tokens.flatten(0, 1).index_select(0, index)
    normalised = F.layer_norm(chosen.float(), (width,), eps=TARGET_NORM_EPS)
    return normalised if isinstance(masks, PackedMasks) else normalised.view(-1, num_predicted, width)


def jepa_loss(prediction: Tensor, target: Tensor, masks: Masks, config: ObjectiveConfig) -> Tensor:
    """Returns the loss, an fp32 scalar: a mean over all elements, or with packed masks over `masks.weights`.

    `prediction` and `target` are (M * E * B, T, D), or (R, D) if packed. smooth_l1: quadratic below
    `config.beta`, linear beyond; l2: the squared error.

    Raises:
        ValueError: the shapes differ.

    Source: arXiv 2301.08243, equation 1 (l2); smooth_l1 with beta 1 is the released code's.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape; "
            "take both from the same masks"
        )
    prediction, target = prediction.float(), target.float()
    if config.loss == "smooth_l1":
        elements = F.smooth_l1_loss(prediction, target, reduction="none", beta=config.beta)
    else:
        elements = F.mse_loss(prediction, target, reduction="none")
    if isinstance(masks, PackedMasks):
        return (elements.mean(dim=-1) * masks.weights).sum()
    return elements.mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy with soft targets, an fp32 scalar, nats, mean over the images.

    `logits` and `targets` are (B, C); each row of `targets` sums to 1.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape; "
            "make targets for as many classes as the head has"
        )
    return -(targets.float() * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()

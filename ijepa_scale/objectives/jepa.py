"""Targets and loss of I-JEPA. Tensors in, a scalar out; knows no model and no process.

Shapes: B images, N patches, D channels, E context blocks, M target blocks of T tokens, R packed target tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels.target_loss import target_loss
from ijepa_scale.config.schema import ObjectiveConfig, RegressionConfig
from ijepa_scale.masks.types import Masks, PackedMasks

TARGET_NORM_EPS = 1e-5


@torch.no_grad()
def normalise_targets(tokens: Tensor) -> Tensor:
    """Returns the target encoder's tokens (B, U, D), each normalised over its channels, fp32; without affine, eps 1e-5.

    Source: the released I-JEPA code's behaviour (the paper doesn't mention this norm).
    """
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=TARGET_NORM_EPS)


@torch.no_grad()
def jepa_targets(features: Tensor, rows: Tensor, masks: Masks) -> Tensor:
    """Returns the features to predict, in the predictor's order: (M * E * B, T, D), or (R, D) if packed.

    `features` are (B, U, D), of all places or of some, and `rows` (R,) int64 says where the targets lie in
    the flattened (B * U): see `Wanted` and, for all places, `target_index`.
    """
    chosen = features.flatten(0, 1).index_select(0, rows)
    return chosen if isinstance(masks, PackedMasks) else chosen.view(-1, masks.targets.shape[2], chosen.shape[-1])


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
    assert isinstance(config, RegressionConfig), f"no beta in {config}"
    prediction, target = prediction.float(), target.float()
    if config.loss == "smooth_l1":
        elements = F.smooth_l1_loss(prediction, target, reduction="none", beta=config.beta)
    else:
        elements = F.mse_loss(prediction, target, reduction="none")
    if isinstance(masks, PackedMasks):
        return (elements.mean(dim=-1) * masks.weights).sum()
    return elements.mean()


def fused_jepa_loss(prediction: Tensor, tokens: Tensor, rows: Tensor, masks: Masks, config: ObjectiveConfig) -> Tensor:
    """Returns `jepa_loss` of the target encoder's tokens (B, U, D) in one pass over them; CUDA and Triton only.

    `rows` (R,) int64 says where the targets lie in the flattened (B * U). The norm and the gradient are part of the
    pass: no normalised, gathered copy is written.

    Raises:
        ValueError: Triton isn't there, or shapes and devices don't fit.
    """
    assert isinstance(config, RegressionConfig), f"no beta in {config}"
    return target_loss(
        prediction.flatten(0, -2),
        tokens.flatten(0, 1),
        rows,
        masks.weights if isinstance(masks, PackedMasks) else None,
        beta=config.beta,
        eps=TARGET_NORM_EPS,
        loss=config.loss,
        implementation="triton",
    )


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

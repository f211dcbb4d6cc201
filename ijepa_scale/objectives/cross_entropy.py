"""The loss of finetuning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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

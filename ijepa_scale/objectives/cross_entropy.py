"""The loss of finetuning. Must not know models or engines."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy with soft targets in nats, averaged over the images, as an fp32 scalar.

    `logits` and `targets` are (B, C); each row of `targets` sums to 1.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape; "
            "make targets with as many classes as the head has"
        )
    return -(targets.float() * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()

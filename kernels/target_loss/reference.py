"""The specification of `target_loss` in plain PyTorch, which torch.compile can fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def target_loss(
    prediction: Tensor,
    tokens: Tensor,
    lookup: Tensor,
    weights: Tensor | None = None,
    *,
    beta: float = 1.0,
    eps: float = 1e-5,
    loss: str = "smooth_l1",
) -> Tensor:
    """Returns the loss, () fp32, computed in fp32; see `ijepa_kernels.target_loss.target_loss`.

    Gathers before it normalises: the norm of a token doesn't depend on the others, and most tokens aren't targets.
    """
    with torch.no_grad():
        chosen = tokens.index_select(0, lookup).float()
        target = F.layer_norm(chosen, (tokens.shape[1],), eps=eps)
    if loss == "smooth_l1":
        elements = F.smooth_l1_loss(prediction.float(), target, reduction="none", beta=beta)
    else:
        elements = F.mse_loss(prediction.float(), target, reduction="none")
    if weights is None:
        return elements.sum() / max(1, elements.numel())
    return (elements.mean(dim=1) * weights).sum()

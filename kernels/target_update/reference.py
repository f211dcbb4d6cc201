"""The specification of `target_update`: tensor by tensor, in elementary operations."""

from __future__ import annotations

import torch
from torch import Tensor


def target_update(
    target: list[Tensor],
    source: list[Tensor],
    momentum: float,
    *,
    copies: list[Tensor] | None = None,
    found_nonfinite: Tensor | None = None,
) -> None:
    """Moves `target` towards `source` in place; see `ijepa_kernels.target_update.target_update`.

    Like `torch.lerp`, starts from the nearer end: from w = 1/2 on it is source - (1 - w) * (source - target).
    """
    weight = torch.tensor(1.0 - momentum, dtype=torch.float32)
    for index, (old, new) in enumerate(zip(target, source, strict=True)):
        difference = new - old
        moved = old + weight * difference if weight < 0.5 else new - (1.0 - weight) * difference
        if found_nonfinite is not None:
            moved = torch.where(found_nonfinite.reshape(()) == 0, moved, old)
        old.copy_(moved)
        if copies is not None:
            copies[index].copy_(moved)

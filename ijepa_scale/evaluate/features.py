"""One feature per image from an encoder's patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.data.eval_reader import EvalBatch

Forward = Callable[[Tensor], Tensor]  # images (B, 3, h, w) -> tokens (B, N, D)
Gather = Callable[[Tensor], Tensor]  # (...) -> (processes, ...), equal shapes on all of them


def local_ids(ids: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Returns this process's consecutive part of `ids`, as long on every process: the last id fills up.

    Sharded encoders communicate in their forward pass, so all processes must make equally many.
    """
    per_process = -(-len(ids) // world)
    filled = np.concatenate([ids, np.repeat(ids[-1:], per_process * world - len(ids))])
    return filled[rank * per_process : (rank + 1) * per_process]


def extract_features(forward: Forward, batches: Iterable[EvalBatch], device: torch.device) -> Tensor:
    """Returns the mean patch token of each image, (N, D) float32 on `device`, in the order of `batches`."""
    with torch.no_grad():
        parts = [forward(batch.images.to(device, non_blocking=True)).float().mean(dim=1) for batch in batches]
    return torch.cat(parts)


def gather_features(features: Tensor, gather: Gather, total: int) -> Tensor:
    """Returns the features of all `total` images in the order of their ids, on every process. Communicates."""
    return gather(features).flatten(0, 1)[:total]

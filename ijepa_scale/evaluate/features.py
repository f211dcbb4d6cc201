"""Computes one feature per image from an encoder's patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.data.eval_reader import EvalBatch

Forward = Callable[[Tensor], Tensor]  # images (B, 3, h, w) -> tokens (B, N, D)
Gather = Callable[[Tensor], Tensor]  # (...) -> (processes, ...); all processes pass equal shapes


def local_ids(ids: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Returns this process's consecutive part of `ids`, padded with the last id to the same length on every process.

    Sharded encoders communicate in forward, so all processes must run it equally often.
    """
    per_process = -(-len(ids) // world)
    padded = np.concatenate([ids, np.repeat(ids[-1:], per_process * world - len(ids))])
    return padded[rank * per_process : (rank + 1) * per_process]


def extract_features(forward: Forward, batches: Iterable[EvalBatch], device: torch.device) -> Tensor:
    """Returns the mean patch token of each image, (N, D) float32 on `device`, in the order of `batches`."""
    with torch.no_grad():
        parts = [forward(batch.images.to(device, non_blocking=True)).float().mean(dim=1) for batch in batches]
    return torch.cat(parts)


def gather_features(features: Tensor, gather: Gather, total: int) -> Tensor:
    """Returns the features of all `total` images, in the order of their ids, on every process. Communicates."""
    return gather(features).flatten(0, 1)[:total]

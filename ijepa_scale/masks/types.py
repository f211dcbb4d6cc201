"""What a mask is to the rest of the package. Index tensors, no model and no process.

Shapes: B images, N patches per image, E context blocks, M target blocks, K context tokens and
T target tokens per block. Patches are numbered row-major.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ijepa_kernels.attention import SequenceLayout


@dataclass(frozen=True)
class DenseMasks:
    """Masks of images that all keep the same number of tokens."""

    context: Tensor  # (E, B, K) int64, ascending along K
    targets: Tensor  # (M, B, T) int64

    def map(self, change: Callable[[Tensor], Tensor]) -> DenseMasks:
        """Returns the masks with `change` applied to each tensor, such as a move to a device."""
        return DenseMasks(change(self.context), change(self.targets))

    def mean_tokens(self) -> tuple[float, float]:
        """Returns tokens per context block and per target block, averaged over the images."""
        return float(self.context.shape[2]), float(self.targets.shape[2])


@dataclass(frozen=True)
class PackedMasks:
    """Masks of images that keep different numbers of tokens, as packed sequences without padding.

    Context sequences lie in the order (context block e, image b), target and predictor sequences in
    the order (target block i, context block e, image b), b fastest. A predictor sequence (i, e, b) is
    the context tokens of (e, b), then the target tokens of (i, b).
    """

    context_index: Tensor  # (C,) int64 into the flattened (B * N) patches: b * N + place
    context_layout: SequenceLayout  # E * B sequences, C tokens
    target_index: Tensor  # (R,) int64 into the flattened (B * N) patches
    predictor_layout: SequenceLayout  # M * E * B sequences, P tokens
    predictor_source: Tensor  # (P,) int64 into cat([context tokens (C), target tokens (R)])
    target_rows: Tensor  # (R,) int64: where the target tokens lie among the P tokens
    target_layout: SequenceLayout  # M * E * B sequences, R tokens
    weights: Tensor  # (R,) float32, sum 1: 1 / (B * M * E * T_b), so images weigh alike

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedMasks:
        """Returns the masks with `change` applied to each tensor, such as a move to a device."""
        fields = {
            name: value.map(change) if isinstance(value, SequenceLayout) else change(value)
            for name, value in vars(self).items()
        }
        return replace(self, **fields)

    def mean_tokens(self) -> tuple[float, float]:
        """Returns tokens per context block and per target block, averaged over the images."""
        num_targets = len(self.target_rows) / len(self.predictor_layout.lengths)
        return self.context_layout.total / len(self.context_layout.lengths), num_targets


Masks = DenseMasks | PackedMasks


@dataclass(frozen=True)
class Wanted:
    """Which tokens of the target encoder are asked for: each target place once, however many blocks hold it.

    Images have different numbers of such places; those with fewer than U get other places of theirs behind
    them, so every row is a real token, but only the rows in `rows` are targets.
    """

    places: Tensor  # (B, U) int64, in each row distinct
    rows: Tensor  # (R,) int64 into the flattened (B * U): the targets in the order of the predictions

    @classmethod
    def of(cls, masks: Masks, num_images: int, num_patches: int) -> Wanted:
        """Returns what `masks`, on the CPU, ask of images with `num_patches` patches."""
        index = target_index(masks, num_patches).numpy()
        asked = np.zeros((num_images, num_patches), dtype=bool)
        asked.reshape(-1)[index] = True
        most = int(asked.sum(axis=1).max())
        numbers = np.arange(num_patches, dtype=np.int32)
        order = np.where(asked, numbers, numbers + num_patches)  # sorted: what is asked for first
        order.sort(axis=1)
        ranks = np.cumsum(asked, axis=1)
        ranks += (most * np.arange(num_images) - 1)[:, None]
        places = torch.from_numpy((order[:, :most] % num_patches).astype(np.int64))
        return cls(places, torch.from_numpy(ranks.reshape(-1)[index]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Wanted:
        """Returns the same with `change` applied to each tensor."""
        return Wanted(change(self.places), change(self.rows))


def target_index(masks: Masks, num_patches: int) -> Tensor:
    """Returns (R,) int64 into the flattened (B * N) patches: the targets in the order of the predictions."""
    if isinstance(masks, PackedMasks):
        return masks.target_index
    offsets = torch.arange(masks.targets.shape[1], device=masks.targets.device)[:, None] * num_patches
    return (masks.targets + offsets)[:, None].expand(-1, masks.context.shape[0], -1, -1).flatten()

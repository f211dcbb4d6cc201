"""Defines masks as index tensors. Must not know how they are drawn, nor models or processes.

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
        """Returns the mean number of tokens per context block and per target block."""
        return float(self.context.shape[2]), float(self.targets.shape[2])


@dataclass(frozen=True)
class PackedMasks:
    """Masks of images that keep different numbers of tokens, as packed sequences without padding.

    Context sequences are stored in the order (context block e, image b), target and predictor sequences in
    the order (target block i, context block e, image b), with b varying fastest. A predictor sequence (i, e, b)
    consists of the context tokens of (e, b), then the target tokens of (i, b).
    """

    context_index: Tensor  # (C,) int64 into the flattened (B * N) patches: b * N + patch
    context_layout: SequenceLayout  # E * B sequences, C tokens
    target_index: Tensor  # (R,) int64 into the flattened (B * N) patches
    predictor_layout: SequenceLayout  # M * E * B sequences, P tokens
    predictor_source: Tensor  # (P,) int64 into cat([context tokens (C), target tokens (R)])
    target_rows: Tensor  # (R,) int64: positions of the target tokens among the P tokens
    target_layout: SequenceLayout  # M * E * B sequences, R tokens
    weights: Tensor  # (R,) float32, sum 1: 1 / (B * M * E * T_b), so all images have equal weight

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedMasks:
        """Returns the masks with `change` applied to each tensor, such as a move to a device."""
        fields = {
            name: value.map(change) if isinstance(value, SequenceLayout) else change(value)
            for name, value in vars(self).items()
        }
        return replace(self, **fields)

    def mean_tokens(self) -> tuple[float, float]:
        """Returns the mean number of tokens per context block and per target block."""
        num_targets = len(self.target_rows) / len(self.predictor_layout.lengths)
        return self.context_layout.total / len(self.context_layout.lengths), num_targets


Masks = DenseMasks | PackedMasks


@dataclass(frozen=True)
class Wanted:
    """The patches that the target encoder must compute: each target patch once, even if several blocks hold it.

    The number of target patches differs between images. Those with fewer than U are filled up with other patches of
    the same image, so every entry of `patches` is a real patch, but only those that `rows` names are targets.
    """

    patches: Tensor  # (B, U) int64, distinct within each row
    rows: Tensor  # (R,) int64 into the flattened (B * U): the targets in the order of the predictions

    @classmethod
    def of(cls, masks: Masks, num_images: int, num_patches: int) -> Wanted:
        """Returns what `masks`, which are on the CPU, need of images with `num_patches` patches."""
        index = target_index(masks, num_patches).numpy()
        needed = np.zeros((num_images, num_patches), dtype=bool)
        needed.reshape(-1)[index] = True
        most = int(needed.sum(axis=1).max())
        numbers = np.arange(num_patches, dtype=np.int32)
        order = np.where(needed, numbers, numbers + num_patches)  # once sorted, needed patches come first
        order.sort(axis=1)
        ranks = np.cumsum(needed, axis=1)
        ranks += (most * np.arange(num_images) - 1)[:, None]
        patches = torch.from_numpy((order[:, :most] % num_patches).astype(np.int64))
        return cls(patches, torch.from_numpy(ranks.reshape(-1)[index]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Wanted:
        """Returns the same with `change` applied to each tensor."""
        return Wanted(change(self.patches), change(self.rows))


def target_index(masks: Masks, num_patches: int) -> Tensor:
    """Returns (R,) int64 into the flattened (B * N) patches: the targets in the order of the predictions."""
    if isinstance(masks, PackedMasks):
        return masks.target_index
    offsets = torch.arange(masks.targets.shape[1], device=masks.targets.device)[:, None] * num_patches
    return (masks.targets + offsets)[:, None].expand(-1, masks.context.shape[0], -1, -1).flatten()

"""What a mask is to the rest of the package. Floor 1: index tensors, no model and no process.

Shapes: B images, N patches per image, E context blocks, M target blocks, K context tokens and
T target tokens per block. Patches are numbered row-major.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ijepa_kernels.attention import SequenceLayout


@dataclass(frozen=True)
class DenseMasks:
    """Masks of images that all keep the same number of tokens."""

    context: Tensor  # (E, B, K) int64, ascending along K
    targets: Tensor  # (M, B, T) int64

    def to(self, device: torch.device | str) -> DenseMasks:
        """Returns the masks on `device`."""
        return DenseMasks(self.context.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))

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
    weights: Tensor  # (R,) float32, sum 1: 1 / (B * M * E * T_b), so images weigh alike

    def to(self, device: torch.device | str) -> PackedMasks:
        """Returns the masks on `device`."""
        fields = {
            name: value.to(device) if isinstance(value, SequenceLayout) else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return replace(self, **fields)

    def mean_tokens(self) -> tuple[float, float]:
        """Returns tokens per context block and per target block, averaged over the images."""
        num_targets = len(self.target_rows) / len(self.predictor_layout.lengths)
        return self.context_layout.total / len(self.context_layout.lengths), num_targets


Masks = DenseMasks | PackedMasks

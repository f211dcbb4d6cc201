"""Measures targets and masks for the rows: the collapse alarm and the numbers of tokens. Must not know any engine."""

from __future__ import annotations

from torch import Tensor

from ijepa_scale.masks import Masks, Wanted
from ijepa_scale.metrics.meters import Meters, feature_std
from ijepa_scale.objectives.targets import normalise_targets

_OBSERVED = 32  # images for the collapse alarm; few suffice, since it averages over many patches and channels


class TargetMeters:
    """Adds the measurements of each micro-batch to the meters. Doesn't synchronise."""

    def __init__(self, meters: Meters, num_patches: int) -> None:
        self._meters = meters
        self._num_patches = num_patches

    def __call__(self, tokens: Tensor, masks: Masks, wanted: Wanted) -> None:
        """Measures the target encoder's tokens (B, U, D) at `wanted.patches`, and the masks' lengths."""
        features, patches = normalise_targets(tokens[:_OBSERVED]), wanted.patches[:_OBSERVED]
        self._meters.add("target_std", feature_std(features, patches, self._num_patches))
        for name, mean in zip(("context_tokens", "target_tokens"), masks.mean_tokens(), strict=True):
            self._meters.add(name, mean)

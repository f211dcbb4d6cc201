"""Context and target masks of I-JEPA as pure functions of (seed, step, position). Floor 1."""

from ijepa_scale.masks.types import DenseMasks, Masks, PackedMasks

__all__ = ["DenseMasks", "Masks", "PackedMasks"]

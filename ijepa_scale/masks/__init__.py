"""Context and target masks of I-JEPA as pure functions of (seed, step, position). Floor 1."""

from ijepa_scale.masks.packing import pack
from ijepa_scale.masks.render import as_grid
from ijepa_scale.masks.sampler import MaskSampler
from ijepa_scale.masks.types import DenseMasks, Masks, PackedMasks

__all__ = ["DenseMasks", "MaskSampler", "Masks", "PackedMasks", "as_grid", "pack"]

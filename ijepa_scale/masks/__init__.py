"""Context and target masks of I-JEPA as pure functions of (seed, step, position)."""

from ijepa_scale.masks.ahead import MasksAhead
from ijepa_scale.masks.packing import pack
from ijepa_scale.masks.render import as_grid
from ijepa_scale.masks.sampler import MaskSampler
from ijepa_scale.masks.types import DenseMasks, Masks, PackedMasks, Wanted

__all__ = ["DenseMasks", "MaskSampler", "Masks", "MasksAhead", "PackedMasks", "Wanted", "as_grid", "pack"]

"""Augmentation of whole batches on the device, each sample by its own keyed draws."""

from ijepa_scale.augment.pipeline import Augment

__all__ = ["Augment"]

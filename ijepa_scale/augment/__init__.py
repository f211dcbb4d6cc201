"""Augmentation of whole batches on the device, each sample by its own keyed draws. Floor 2."""

from ijepa_scale.augment.pipeline import Augment

__all__ = ["Augment"]

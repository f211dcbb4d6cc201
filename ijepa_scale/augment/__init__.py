"""Augmentation of whole batches on the device. Each sample has its own keyed random draws."""

from ijepa_scale.augment.pipeline import Augment

__all__ = ["Augment"]

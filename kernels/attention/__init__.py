"""Scaled dot-product attention, dense or over packed sequences."""

from ijepa_kernels.attention.layout import SequenceLayout

__all__ = ["SequenceLayout"]

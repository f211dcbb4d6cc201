"""Saves and loads checkpoints, and converts weights from and to other programs."""

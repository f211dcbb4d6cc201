"""Saving and resuming. Floor 3."""

"""Checks a machine or a cluster before a run: software, GPUs, limits, folders, decoding and links. Trains nothing."""

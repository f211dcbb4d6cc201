"""Engines, which run a training step on one or many processes, behind one protocol."""

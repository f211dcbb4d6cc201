"""Computes what a run needs and how fast it can be: sizes, FLOPs, memory, hardware peaks. Builds no model."""

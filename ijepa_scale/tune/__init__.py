"""Measures on this machine which settings train fastest without running out of memory.

Varies only how the step is computed; the batch, the masks and all hyperparameters stay as configured.
"""

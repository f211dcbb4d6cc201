"""Measures on the machine at hand which settings train fastest without running out of memory.

Only how the step is computed is varied; batch, masks and numbers of the training stay what the configuration says.
"""

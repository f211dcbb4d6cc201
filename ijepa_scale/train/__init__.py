"""Training: one step, one loop. Floor 4."""

"""Training: one loop, and one step for each kind of training."""

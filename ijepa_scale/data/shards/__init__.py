"""Sets of tar shards as a whole: made from images, described, verified. Floor 2: no model, no training."""

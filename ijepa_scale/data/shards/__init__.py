"""Sets of tar shards as a whole: made from images, described, verified. No model, no training."""

"""Makes, describes and verifies sets of tar shards. Knows nothing of models or training."""

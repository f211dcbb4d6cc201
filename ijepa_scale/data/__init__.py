"""From tar shards, class folders or nothing to batches of crops."""

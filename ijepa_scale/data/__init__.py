"""Reads tar shards, class folders or synthetic images and delivers batches of crops."""

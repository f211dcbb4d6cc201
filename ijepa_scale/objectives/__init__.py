"""Losses, and the targets that predictions are compared with."""

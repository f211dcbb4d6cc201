"""Watching a run: numbers added up on the device, written as rows, drawn as pictures."""

"""Metrics of a run: accumulated on the device, written as rows, drawn as pictures."""

"""Gives encoders to benchmarks of other projects. Each file needs its project's package, and imports it."""

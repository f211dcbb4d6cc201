"""Runs as Slurm's jobs: submitted, started again, watched and ended."""

"""Benchmarks of this project. Each script states its question, and anyone can run it again."""

"""Evaluates features and classifiers."""

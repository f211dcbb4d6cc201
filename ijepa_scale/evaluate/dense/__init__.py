"""Evaluates frozen patch tokens on tasks that have an answer for every pixel."""

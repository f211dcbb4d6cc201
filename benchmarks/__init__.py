"""Measurements of this project; each script says what it asks and prints what anyone can print again."""

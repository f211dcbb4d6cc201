"""Completion of `ijepa` in shells: what may stand next, the scripts that ask for it, and the table that answers.

A shell asks at each Tab, so nothing here may import torch, or anything else that takes long. `known.py` alone does: it
writes the table from the launch scripts, in `make docs`.
"""

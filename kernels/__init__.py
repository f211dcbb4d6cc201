"""Kernels behind plain functions: one public function per folder, its reference in plain PyTorch.

Installed as `ijepa_kernels`. Knows tensors only: nothing of models, masks, processes or configs.
"""

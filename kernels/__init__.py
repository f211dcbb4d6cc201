"""Kernels behind plain functions: each folder has one public function and its reference in plain PyTorch.

Installed as `ijepa_kernels`. Kernels work on tensors and must not depend on models, masks, processes or configs.
"""

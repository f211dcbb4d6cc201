"""The operations that selective checkpointing keeps, in PyTorch with and without oneDNN."""

from __future__ import annotations

import runpy

import pytest
import torch

from ijepa_kernels.linear import onednn
from ijepa_scale.engine import parallelize

PRODUCT = torch.ops.mkldnn._linear_pointwise.default if onednn.is_available() else None


@pytest.mark.skipif(PRODUCT is None, reason="needs a PyTorch with oneDNN")
def test_onednn_operations_are_kept_if_they_exist(monkeypatch) -> None:
    assert PRODUCT in parallelize._kept_operations()
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # as in a PyTorch built without oneDNN
    kept = runpy.run_path(parallelize.__file__)["_kept_operations"]()
    assert kept and PRODUCT not in kept

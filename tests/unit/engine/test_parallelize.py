"""What selective checkpointing keeps, with and without oneDNN in PyTorch."""

from __future__ import annotations

import runpy

import pytest
import torch

from ijepa_kernels.linear import onednn
from ijepa_scale.engine import parallelize

PRODUCT = torch.ops.mkldnn._linear_pointwise.default if onednn.is_available() else None


@pytest.mark.skipif(PRODUCT is None, reason="needs a PyTorch with oneDNN")
def test_onednns_products_are_kept_where_there_are_any(monkeypatch) -> None:
    assert PRODUCT in parallelize._kept_operations()
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # as where PyTorch was built without it
    kept = runpy.run_path(parallelize.__file__)["_kept_operations"]()
    assert kept and PRODUCT not in kept

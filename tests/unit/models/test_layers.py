"""The patch projection on GPUs, whose products need rows of whole 16 bytes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import fake_tensor

from ijepa_scale.models import layers
from ijepa_scale.models.layers import PatchProjection, aligned


@pytest.mark.parametrize(
    ("patch", "autocast", "weight", "expected"),
    [
        (14, True, torch.float32, (592, torch.bfloat16)),
        (14, False, torch.bfloat16, (592, torch.bfloat16)),  # the target's copy, and FSDP2
        (14, False, torch.float32, (588, torch.float32)),  # 2352 bytes
        (16, True, torch.float32, (768, torch.float32)),  # aligned: left to autocast
    ],
)
def test_rows_become_multiples_of_16_bytes(patch, autocast, weight, expected):
    kernel, patches = torch.ones(8, 3 * patch**2, dtype=weight), torch.ones(2, 5, 3 * patch**2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        x, w = aligned(patches, kernel)
    assert (x.shape[-1], w.dtype) == (w.shape[-1], w.dtype) == expected
    assert x[..., : 3 * patch**2].eq(1).all() and x[..., 3 * patch**2 :].eq(0).all()
    assert w[..., : 3 * patch**2].eq(1).all() and w[..., 3 * patch**2 :].eq(0).all()


@pytest.mark.parametrize("autocast", [True, False])
def test_zeros_change_no_value_and_no_gradient(autocast):
    """Small whole numbers, whose products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    proj = PatchProjection(3, 24, kernel_size=14, stride=14)
    for parameter in proj.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).float()
    if not autocast:
        proj.bfloat16()
    patches = torch.randint(-1, 2, (2, 5, 588), generator=generator).float().requires_grad_()
    upstream = torch.randint(-1, 2, (2, 5, 24), generator=generator)
    found = []
    for padded in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            x, w = aligned(patches, proj.weight.flatten(1)) if padded else (patches, proj.weight.flatten(1))
            tokens = layers.linear(x.to(w.dtype), w, proj.bias)
        gradients = torch.autograd.grad(tokens, (patches, *proj.parameters()), upstream.to(tokens.dtype))
        found.append((tokens, *gradients))
    assert found[1][0].abs().max() > 10 and found[1][2].shape == (24, 3, 14, 14)
    for plain, padded in zip(*found, strict=True):
        assert torch.equal(plain, padded)


@pytest.mark.parametrize(("device", "width"), [("cuda", 592), ("cpu", 588)])
def test_only_gpus_get_zeros(monkeypatch, device, width):
    widths = []
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # no driver here
    monkeypatch.setattr(
        layers, "linear", lambda input, weight, bias: widths.append((input.shape[-1], weight.shape[-1]))
    )
    with fake_tensor.FakeTensorMode():
        proj = PatchProjection(3, 24, kernel_size=14, stride=14, device=device, dtype=torch.bfloat16)
        proj(torch.empty(2, 5, 588, device=device))
    assert widths == [(width, width)] and proj.weight.shape == (24, 3, 14, 14)

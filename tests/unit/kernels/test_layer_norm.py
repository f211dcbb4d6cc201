"""layer_norm: the reference against elementary operations, and what is refused."""

import sys

import pytest
import torch

from ijepa_kernels.layer_norm import cost, layer_norm


def inputs(shape, *, dtype=torch.float32, result=torch.float32):
    """Returns x, weight, bias, all with gradients, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).mul(3).add(1).to(dtype).requires_grad_()
    weight, bias = (torch.randn(shape[-1], generator=generator).requires_grad_() for _ in range(2))
    return x, weight, bias, torch.randn(shape, generator=generator).to(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 7), (0, 5)])
def test_reference_equals_elementary_operations(shape, dtype, result):
    x, weight, bias, upstream = inputs(shape, dtype=dtype, result=result)
    out = layer_norm(x, weight, bias, dtype=result)
    wide = x.double()  # once: two casts would add two rounded gradients
    centred = wide - wide.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight.double() + bias.double()
    assert out.dtype == result and out.shape == shape
    # one rounding to the dtype of each, and fp32 sums
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
    torch.testing.assert_close(out.double(), expected, rtol=rounding[result], atol=1e-5)
    gradients = torch.autograd.grad(out, (x, weight, bias), upstream)
    wanted = torch.autograd.grad(expected, (x, weight, bias), upstream.double())
    for found, value in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=rounding[found.dtype], atol=1e-4)


def test_cost_counts_bytes():
    found = cost(10, 8, input_bytes=4, output_bytes=2)
    assert found == {"read_bytes": 320.0, "written_bytes": 160.0, "flops": 640.0}
    found = cost(10, 8, input_bytes=4, output_bytes=2, backward=True)
    assert found == {"read_bytes": 480.0, "written_bytes": 320.0, "flops": 1120.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"x \(2, 4\), weight \(3,\) and bias \(4,\) don't fit; give \(..., D\), \(D,\)"),
        ({"x": torch.zeros(2, 4).double()}, "x is torch.float64, .* give float32 or bfloat16 for x and the result"),
        ({"bias": torch.zeros(4).bfloat16()}, "bias torch.bfloat16, the result torch.float32; give"),
        ({"dtype": torch.float16}, "the result torch.float16; give float32 or bfloat16"),
        ({"bias": torch.zeros(4, device="meta")}, "the tensors are on cpu, cpu, meta; move them to one device"),
        ({"implementation": "apex"}, "implementation 'apex' is unknown; choose one of auto, reference, triton"),
        ({"implementation": "triton"}, "layer_norm needs CUDA tensors and these are on cpu; choose implementation="),
        (
            {**{name: torch.zeros(40000) for name in ("x", "weight", "bias")}, "implementation": "triton"},
            "width 40000 is more than a program's registers hold, 32768; choose implementation='reference'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"x": torch.zeros(2, 4), "weight": torch.ones(4), "bias": torch.zeros(4), **change}
    with pytest.raises(ValueError, match=message):
        layer_norm(**given)


def test_triton_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ijepa_kernels.layer_norm.triton", None)
    with pytest.raises(ValueError, match="Triton is needed for layer_norm .*or choose implementation='reference'"):
        layer_norm(torch.zeros(2, 4), torch.ones(4), torch.zeros(4), implementation="triton")

"""fp8_linear: what quantising costs, torch._scaled_mm on the CPU against the reference, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels.fp8_linear import FP8, Fp8UnavailableError, check_capability, cost, fp8_linear, quantise_rows

BOTH = pytest.mark.parametrize("implementation", ["reference", "scaled_mm"])


def layer(rows=(3, 5), inputs=64, outputs=48, dtype=torch.float32):
    """Returns x, weight and bias; rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inputs, generator=generator) * torch.rand(*rows, 1, generator=generator).mul(6).exp()
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator).exp()
    return x.to(dtype), weight / inputs**0.5, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_values_are_within_the_formats_rounding(dtype):
    x, _, _ = layer(dtype=dtype)
    values, scale = quantise_rows(x)
    assert values.dtype == FP8 and values.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (3, 5, 1)
    torch.testing.assert_close(values.float().abs().amax(dim=-1), torch.full((3, 5), 448.0))
    error = (values.float() * scale - x.float()).abs()
    # half a step: 2^-4 of the value, 2^-10 of the scale below the smallest normal number; 1e-6 for fp32
    assert bool((error <= torch.maximum(x.float().abs() / 16, scale / 1024) * (1 + 1e-6)).all())


def test_rows_of_zeros_and_of_what_is_not_finite():
    x = torch.zeros(3, 16)
    x[1, 4], x[2, 5] = torch.nan, torch.inf
    values, scale = quantise_rows(x)
    assert torch.equal(values[0].float(), torch.zeros(16)) and scale[0].isfinite()
    assert bool((values.float() * scale)[1:].isnan().all())
    assert quantise_rows(torch.zeros(0, 16))[1].shape == (0, 1)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_near_the_layer_in_fp32(implementation, dtype, biased):
    x, weight, bias = layer(dtype=dtype)
    bias = bias if biased else None
    found = fp8_linear(x, *quantise_rows(weight), bias, implementation=implementation)
    assert found.dtype == torch.bfloat16 and found.shape == (3, 5, 48)
    expected = F.linear(x.float(), weight, bias)
    # each factor is off by up to 1/16, about 1/28 in the root mean square; errors of a sum are independent
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(3, 5), (1,), (), (7,), (0,), (2, 0)])
def test_scaled_mm_equals_the_reference(rows, dtype):
    x, weight, bias = layer(rows, 80, 32, dtype)
    quantised = quantise_rows(weight)
    found = fp8_linear(x, *quantised, bias)
    expected = fp8_linear(x, *quantised, bias, implementation="reference")
    # the same fp8 values; sums in another order may tip the rounding to bf16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)


def test_strided_inputs_and_autocast_change_nothing():
    x, weight, bias = layer((6,))
    values, scale = quantise_rows(weight)
    expected = fp8_linear(x, values, scale, bias)
    wide = x.repeat_interleave(2, dim=1)[:, ::2]
    turned = values.t().contiguous().t()
    assert not wide.is_contiguous() and not turned.is_contiguous()
    assert torch.equal(fp8_linear(wide, turned, scale.expand(-1, 2)[:, :1], bias), expected)
    reference = fp8_linear(x, values, scale, bias, implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fp8_linear(x, values, scale, bias), expected)
        assert torch.equal(fp8_linear(x, values, scale, bias, implementation="reference"), reference)


def test_it_compiles_into_one_graph():
    x, weight, bias = layer((6,))
    quantised = quantise_rows(weight)
    compiled = torch.compile(lambda *values: fp8_linear(*values), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *quantised, bias), fp8_linear(x, *quantised, bias))


def test_cost_counts_bytes_and_operations():
    found = cost(10, 32, 16, input_bytes=4)
    quantised, weights = 10 * 32 + 40, 16 * 32 + 64
    assert found["read_bytes"] == 10 * 32 * 4 + quantised + weights
    assert found["written_bytes"] == quantised + 10 * 16 * 2 and found["flops"] == 2 * 10 * 32 * 16


def test_an_older_gpu_is_refused_by_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(Fp8UnavailableError, match="cuda:1 has compute capability 8.0, but fp8 products need 8.9 or h"):
        check_capability(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_capability(torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 32)},
            r"x \(2, 32\) and weight \(32, 16\) torch.float8_e4m3fn don't fit; give \(..., K\)",
        ),
        ({"weight": torch.zeros(32, 16)}, r"weight \(32, 16\) torch.float32 don't fit"),
        ({"x": torch.zeros(2, 24), "weight": torch.zeros(32, 24).to(FP8)}, "multiples of 16, not 24 -> 32; set precis"),
        ({"weight": torch.zeros(8, 16).to(FP8)}, "multiples of 16, not 16 -> 8; set precision bf16 for this layer"),
        ({"x": torch.zeros(2, 16).half()}, "x is torch.float16; give float32 or bfloat16"),
        ({"weight_scale": torch.ones(32)}, r"weight_scale is \(32,\) torch.float32; give \(32, 1\) float32"),
        ({"bias": torch.zeros(16)}, r"bias is \(16,\); give \(32,\)"),
        (
            {"x": torch.zeros(2, 16, requires_grad=True)},
            "has no gradient but x requires one; call it under torch.no_gr",
        ),
        ({"implementation": "triton"}, "'triton' is unknown; choose one of auto, reference, scaled_mm"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"x": torch.zeros(2, 16), "weight": torch.zeros(32, 16).to(FP8), "weight_scale": torch.ones(32, 1)}
    with pytest.raises(ValueError, match=message):
        fp8_linear(**{**given, **change})

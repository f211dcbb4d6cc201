"""The linear layer on the CPU against its definition, forward and gradients."""

import pytest
import torch

from ijepa_kernels.linear import cost, linear

TOLERANCE = 1e-4  # fp32 sums of up to 1200 products of order 1, in another order


def inputs(rows, width, out, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, width), (out, width)] + ([(out,)] if bias else [])
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("implementation", ["auto", "torch", "onednn"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [((5,), 7, 3), ((2, 9), 96, 32), ((2, 9), 32, 96), ((2, 600), 8, 24), ((1, 1), 1, 1), ((0,), 4, 2), ((), 6, 3)],
)
def test_forward_and_gradients_are_the_definitions(rows, width, out, bias, implementation):
    given = inputs(rows, width, out, bias)
    wide = [x.detach().double().requires_grad_() for x in given]
    found = linear(*given, implementation=implementation)
    expected = wide[0] @ wide[1].T + (wide[2] if bias else 0)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        (found, *torch.autograd.grad(found, given, upstream)),
        (expected, *torch.autograd.grad(expected, wide, upstream.double())),
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), atol=TOLERANCE, rtol=TOLERANCE)


def test_slices_and_transposes_are_taken_as_they_are():
    x, weight, bias = inputs((6, 4), 16, 12)
    found = linear(x.transpose(0, 1), weight[4:8], bias[4:8], implementation="onednn")
    torch.testing.assert_close(found, x.transpose(0, 1) @ weight[4:8].T + bias[4:8])
    found.square().sum().backward()
    assert weight.grad[:4].abs().max() == 0 < weight.grad[4:8].abs().min()


def test_a_bias_may_have_any_stride():
    x, weight, bias = inputs((5,), 6, 4)
    strided = torch.stack([bias.detach(), torch.full((4,), 100.0)], dim=1)[:, 0].requires_grad_()
    assert not strided.is_contiguous()
    found = linear(x, weight, strided, implementation="onednn")
    torch.testing.assert_close(found, x @ weight.T + bias)
    found.sum().backward()
    assert strided.grad.tolist() == [5.0] * 4


def test_a_second_derivative_is_refused():
    x, weight, bias = inputs((3,), 4, 5)
    found = linear(x, weight, bias, implementation="onednn").square().sum()
    (gradient,) = torch.autograd.grad(found, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("implementation", ["auto", "torch", "onednn"])
@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((2, 3), (5, 4), (5,)), r"input \(2, 3\), weight \(5, 4\) and bias \(5,\) don't fit; expected"),
        (((2, 4), (5, 4), (4,)), r"bias \(4,\) don't fit; .*: pass the weight and the bias that belong"),
        (((2, 4), (4,), None), r"weight \(4,\) and bias None don't fit"),
        (((), (5, 4), None), r"input \(\), weight \(5, 4\)"),
    ],
)
def test_widths_that_do_not_fit_are_refused(shapes, text, implementation):
    with pytest.raises(ValueError, match=text):
        linear(*(None if shape is None else torch.zeros(shape) for shape in shapes), implementation=implementation)


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = inputs((3,), 4, 5)
    linear(x, weight.detach(), bias, implementation="onednn").sum().backward()
    assert weight.grad is None and x.grad.shape == (3, 4) and bias.grad.tolist() == [3.0] * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_are_pytorchs(dtype):
    x, weight, bias = (t.detach().to(dtype) for t in inputs((3,), 4, 5))
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    with pytest.raises(ValueError, match="onednn takes fp32 on the CPU outside autocast, not .* choose auto"):
        linear(x, weight, bias, implementation="onednn")
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float(), bias.float()).dtype == torch.bfloat16


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="implementation 'mkl' is unknown; choose one of auto, torch, onednn"):
        linear(*inputs((3,), 4, 5), implementation="mkl")


def test_cost_counts_each_tensor_once():
    assert cost(10, 3, 2, bytes_per_value=4) == {"bytes": 4.0 * (30 + 20 + 6 + 2), "flops": 120.0}

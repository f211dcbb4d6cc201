"""A linear layer's three products through oneDNN.

The weight's gradient is a product over the tokens, and there oneDNN is ahead only where it makes the smaller of the
two widths the rows: 105 to 107 GFLOP/s against MKL's 100, and 95 the other way round (one EPYC core). So it is
made transposed where that is the other way, unless the tokens are too few to pay for turning it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MANY_TOKENS = 1024


def is_available() -> bool:
    """Returns whether this PyTorch was built with oneDNN."""
    return torch._C._has_mkldnn  # what torch.backends.mkldnn.is_available asks, in a form that torch.compile takes


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns input @ weight^T + bias of fp32 CPU tensors, differentiable in all three, once."""
    return _Linear.apply(input, weight, bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # a bias is read as if it were contiguous, whatever its strides
    return torch.ops.mkldnn._linear_pointwise(
        input, weight, None if bias is None else bias.contiguous(), "none", [], ""
    )


def _rows(tensor: Tensor) -> Tensor:
    """Returns (tokens, width) of (..., width); one row of (width,)."""
    return tensor[None] if tensor.dim() == 1 else tensor.flatten(0, -2)


def _weight_gradient(gradient: Tensor, input: Tensor) -> Tensor:
    """Returns gradient^T @ input, (out, in), of (tokens, out) and (tokens, in)."""
    if len(input) and input.shape[1] > gradient.shape[1]:
        return _product(gradient.t(), input.t(), None)
    if len(input) >= _MANY_TOKENS:
        return _product(input.t(), gradient.t(), None).t().contiguous()
    return gradient.t() @ input


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable  # the products are outside autograd: a second derivative would be wrong without a word
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = _rows(gradient)
        of_input, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t(), None) if of_input else None,
            _weight_gradient(rows, _rows(input)) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )

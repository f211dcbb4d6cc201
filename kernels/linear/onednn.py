"""The three matrix products of a linear layer through oneDNN.

The gradient of the weight is a product over the tokens. There oneDNN is faster than MKL only if the smaller of the two
widths becomes the rows of the result: 105 to 107 GFLOP/s against MKL's 100, and 95 the other way round (one EPYC
core). So where the smaller width would become the columns, the product is computed transposed, unless there are too
few tokens to pay for transposing it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MANY_TOKENS = 1024


def is_available() -> bool:
    """Returns whether this PyTorch was built with oneDNN."""
    return torch._C._has_mkldnn  # as torch.backends.mkldnn.is_available(), but torch.compile can trace this


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns input @ weight^T + bias of fp32 CPU tensors; all three have first derivatives, but no second ones."""
    return _Linear.apply(input, weight, bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # the operation reads a bias as if it were contiguous, whatever its strides
    return torch.ops.mkldnn._linear_pointwise(
        input, weight, None if bias is None else bias.contiguous(), "none", [], ""
    )


def _rows(tensor: Tensor) -> Tensor:
    """Returns (..., width) as (tokens, width); (width,) becomes one row."""
    return tensor[None] if tensor.dim() == 1 else tensor.flatten(0, -2)


def _weight_gradient(gradient: Tensor, input: Tensor) -> Tensor:
    """Returns gradient^T @ input, (out, in), for `gradient` (tokens, out) and `input` (tokens, in)."""
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
    @once_differentiable  # autograd doesn't see the products: a second derivative would be silently wrong
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = _rows(gradient)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t(), None) if needs_input else None,
            _weight_gradient(rows, _rows(input)) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )

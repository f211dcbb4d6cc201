"""The forward and the input's gradient through oneDNN; the weight's gradient stays with MKL. Floor 1.

That gradient is a product over the tokens, at which neither library is ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_available() -> bool:
    """Returns whether this PyTorch was built with oneDNN."""
    return torch._C._has_mkldnn  # what torch.backends.mkldnn.is_available asks, in a form that torch.compile takes


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns input @ weight^T + bias of fp32 CPU tensors, differentiable in all three."""
    return _Linear.apply(input, weight, bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_input, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t(), None) if of_input else None,
            rows.t() @ input.flatten(0, -2) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )

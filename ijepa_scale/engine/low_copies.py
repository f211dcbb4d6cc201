"""Makes the linear and patch layers of a trainable module compute with bf16 copies of their weights, from outside it.

Under autocast each forward casts every fp32 weight again. With the fused tail the copies are renewed where the weights
move, so no forward casts weights. Only the classes of layers change: parameters, their names and the model's code stay
the same. The copies are buffers that aren't saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ijepa_scale.models.layers import Linear, PatchProjection, aligned


class _Product(torch.autograd.Function):
    """input @ weight^T + bias, computed in bf16 from copies; gradients of weight and bias are fp32."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, weight_copy: Tensor, bias_copy: Tensor
    ) -> Tensor:
        """`weight` (out, in) and `bias` (out,) only receive gradients; their bf16 copies are multiplied."""
        low = input.to(torch.bfloat16)
        ctx.save_for_backward(low, weight_copy)
        ctx.input_dtype = input.dtype
        return F.linear(low, weight_copy, bias_copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low, weight_copy = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = gradient.flatten(0, -2)
        return (
            (gradient @ weight_copy).to(ctx.input_dtype) if needs_input else None,
            _weight_gradient(rows, low.flatten(0, -2)) if needs_weight else None,
            rows.sum(dim=0, dtype=torch.float32) if needs_bias else None,
            None,
            None,
        )


def _weight_gradient(gradient: Tensor, input: Tensor) -> Tensor:
    """Returns gradient^T @ input, (out, in) fp32, for bf16 tensors with a row per token.

    It is the product's own fp32 sum. PyTorch has no such product on the CPU; there the result is rounded to bf16, as
    under autocast.
    """
    if gradient.device.type != "cpu":
        return torch.mm(gradient.t(), input, out_dtype=torch.float32)
    return (gradient.t() @ input).float()


class CopiedLinear(Linear):
    """A linear layer that multiplies with bf16 copies and returns bf16."""

    weight_copy: Tensor
    bias_copy: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Returns the projection along the last dimension."""
        return _Product.apply(input, self.weight, self.bias, self.weight_copy, self.bias_copy)

    def rows(self, input: Tensor, start: int, stop: int) -> Tensor:
        """Returns only the outputs [start, stop) of `forward`."""
        parts = (self.weight, self.bias, self.weight_copy, self.bias_copy)
        return _Product.apply(input, *(part[start:stop] for part in parts))


class CopiedPatchProjection(PatchProjection):
    """A patch projection that multiplies with bf16 copies and returns bf16."""

    weight_copy: Tensor
    bias_copy: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Returns tokens (..., D) of patches (..., 3 * P * P)."""
        weight, copy = self.weight.flatten(1), self.weight_copy.flatten(1)
        if input.is_cuda:
            input, copy = aligned(input, copy)
            weight = F.pad(weight, (0, copy.shape[1] - weight.shape[1]))  # it only receives the gradient
        return _Product.apply(input, weight, self.bias, copy, self.bias_copy)


def use_low_copies(module: nn.Module) -> dict[Tensor, Tensor]:
    """Makes the module's layers compute with bf16 copies, and returns the copy of each of their parameters.

    The module must be on its device. The copies must be renewed whenever the parameters change.
    """
    kinds = {Linear: CopiedLinear, PatchProjection: CopiedPatchProjection}
    copies: dict[Tensor, Tensor] = {}
    for part in module.modules():
        if type(part) in kinds:
            for name, parameter in list(part.named_parameters(recurse=False)):
                copy = parameter.detach().to(torch.bfloat16)
                part.register_buffer(f"{name}_copy", copy, persistent=False)
                copies[parameter] = copy
            part.__class__ = kinds[type(part)]
    return copies


def renew(copies: dict[Tensor, Tensor]) -> None:
    """Rounds the parameters into their copies again. Call after they were loaded."""
    with torch.no_grad():
        for parameter, copy in copies.items():
            copy.copy_(parameter)

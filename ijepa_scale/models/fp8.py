"""An encoder's linear layers in fp8, for forward passes without gradients.

Weights are quantised when they change, inputs in each forward. Norms, the residual stream and attention don't change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_kernels.fp8_linear import fp8_linear, quantise_rows
from ijepa_scale.models.layers import Linear


class Fp8Linear(nn.Module):
    """A linear layer of a block, computed from an fp8 copy of its fp32 master weight."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, source: Linear, *, fast_accumulation: bool = False) -> None:
        """`fast_accumulation` makes the product on CUDA faster and less exact; see `ijepa_kernels.fp8_linear`."""
        super().__init__()
        self.fast_accumulation = fast_accumulation
        self.bias = source.bias
        self.register_buffer("weight", torch.empty_like(source.weight, dtype=torch.float8_e4m3fn), persistent=False)
        scale = torch.empty(len(source.weight), 1, device=source.weight.device)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.refresh(source.weight)

    @torch.no_grad()
    def refresh(self, master: Tensor) -> None:
        """Replaces the fp8 copy by `master` (N, K) fp32, quantised row by row."""
        values, scale = quantise_rows(master)
        self.weight.copy_(values)
        self.weight_scale.copy_(scale)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the projection along the last dimension, bf16."""
        return self._product(input, self.weight, self.weight_scale, self.bias)

    def rows(self, input: Tensor, start: int, stop: int) -> Tensor:
        """Returns only the outputs [start, stop) of `forward`."""
        # Not a slice: for a sliced bias, Inductor (torch 2.11) fails with an assertion, and it removes a `clone`.
        bias = self.bias.index_select(0, torch.arange(start, stop, device=self.bias.device))
        return self._product(input, self.weight[start:stop], self.weight_scale[start:stop], bias)

    def _product(self, *tensors: Tensor) -> Tensor:
        return fp8_linear(*tensors, fast_accumulation=self.fast_accumulation)


def cosine(features: Tensor, expected: Tensor) -> tuple[float, float]:
    """Returns the mean and the smallest cosine between the tokens (..., D) of two encoders. Synchronises."""
    found = F.cosine_similarity(features.float(), expected.float(), dim=-1)
    return found.mean().item(), found.min().item()  # host sync: once per run

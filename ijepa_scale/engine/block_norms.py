"""Norms of the gradient in each transformer block. Must not know how an engine stores gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ijepa_scale.optim.groups import clean_name

_BLOCK = re.compile(r"(?:^|\.)(?:\w+_)?blocks\.(\d+)\.")


class BlockNorms:
    """The blocks of a trainable module, and the norms of gradients that are given in the order of its parameters.

    A block is called by its part and number, such as encoder_0; a part's other parameters are its "rest".
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        names = [clean_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad]
        blocks = [_block(name) for name in names]
        self.names = list(dict.fromkeys(blocks))
        self._index = torch.tensor([self.names.index(block) for block in blocks], device=device)

    def __call__(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Returns the norm, () fp32, of each block. Doesn't synchronise.

        `gradients` are those of all trainable parameters; None is 0.
        """
        return self.norms(self.squares(gradients))

    def squares(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Returns the squared norms (blocks,) fp32, which add up over processes if `gradients` are parts of them."""
        zero = torch.zeros((), device=self._index.device)
        present = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
        norms = iter(torch._foreach_norm(present) if present else ())
        each = [next(norms) if gradient is not None and gradient.numel() else zero for gradient in gradients]
        squares = torch.stack([norm.to(zero) for norm in each]).square()
        return torch.zeros(len(self.names), device=squares.device).index_add_(0, self._index, squares)

    def norms(self, squares: Tensor) -> dict[str, Tensor]:
        """Returns the norm of each block from the result of `squares`, added up over all parts."""
        return dict(zip(self.names, squares.sqrt().unbind(), strict=True))


def _block(name: str) -> str:
    part = name.partition(".")[0]
    found = _BLOCK.search(name)
    return f"{part}_{found[1]}" if found else f"{part}_rest"

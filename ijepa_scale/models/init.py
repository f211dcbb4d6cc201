"""The initialisation of all models. Draws come from the given generator, never from a global one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ijepa_scale.models.layers import Block

STD = 0.02
CUT = 2.0  # weights are clamped to [-CUT, CUT], in absolute units
HEAD_STD = 2e-5  # for a classifier's last layer. Source: arXiv 2111.06377, appendix A.1, with its released code


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator, rescale_residual: bool = False) -> None:
    """Fills every parameter of an encoder or predictor in place, in `modules()` order, from `generator` alone.

    Linear and convolution weights and the mask token are normal with std 0.02. Biases are 0; layer norms have weight
    1 and bias 0. `rescale_residual` then divides `attn.proj.weight` and `mlp.fc2.weight` of block l, counted from
    1, by sqrt(2 l). Run it on the CPU before anything is sharded: other devices draw other numbers.

    Raises:
        ValueError: a parameter belongs to a layer type that this function doesn't know.

    Source: the behaviour of the released I-JEPA code. It also intends the rescaling, but a second pass undoes it.
    """
    known: set[int] = set()
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            own = {name: own[name] for name in ("weight", "bias") if name in own}
            _normal(layer.weight, generator)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.LayerNorm):
            own = {name: own[name] for name in ("weight", "bias") if name in own}
            layer.weight.fill_(1.0)
            layer.bias.zero_()
        elif set(own) == {"mask_token"}:
            _normal(own["mask_token"], generator)
        else:
            own = {}
        known.update(id(parameter) for parameter in own.values())
    unknown = [name for name, parameter in module.named_parameters() if id(parameter) not in known]
    if unknown:
        raise ValueError(f"no initialisation is known for {', '.join(unknown)}; add it to models/init.py")
    if rescale_residual:
        _rescale(module)


@torch.no_grad()
def initialise_head(head: nn.Linear, generator: torch.Generator) -> None:
    """Fills a classifier's last layer in place, with bias 0 and weights so small that all classes start out equal."""
    _normal(head.weight, generator, HEAD_STD)
    head.bias.zero_()


def _normal(weight: Tensor, generator: torch.Generator, std: float = STD) -> None:
    # Not trunc_normal_: with the cut 100 std away, all that its inverse-CDF draw would change is that about one weight
    # in 2^24 becomes the cut itself, -2.0 among weights of 0.02.
    weight.normal_(0.0, std, generator=generator).clamp_(-CUT, CUT)


def _rescale(module: nn.Module) -> None:
    blocks = [layer for layer in module.modules() if isinstance(layer, Block)]
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_((2.0 * layer) ** 0.5)
        block.mlp.fc2.weight.div_((2.0 * layer) ** 0.5)

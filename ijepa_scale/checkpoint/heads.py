"""Tells a source of weights how many attention heads its encoder has, where no file does."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ijepa_scale.checkpoint.geometry import PATCHES
from ijepa_scale.checkpoint.sources import Weights, WeightsSource
from ijepa_scale.errors import ConfigError

_DIMS = (16, 32, 64, 80, 88, 104, 128)  # usual sizes of a head, for a proposal


def check_heads(weights: Weights, heads: int) -> None:
    """Checks that the encoder's width can be cut into heads.

    Raises:
        ConfigError: it can't.
    """
    width = weights.tensors[PATCHES].shape[0] if PATCHES in weights.tensors else 0
    if width % heads:
        fits = ", ".join(str(width // dim) for dim in reversed(_DIMS) if width % dim == 0)
        raise ConfigError(
            f"heads is {heads}, which doesn't divide the width {width} of {weights.origin}; give a divisor"
            + (f", such as {fits}" if fits else "")
        )


def told_heads(weights: Weights, heads: int | None) -> Weights:
    """Returns the weights with these heads in their facts; themselves if `heads` is None.

    Raises:
        ConfigError: the source tells another number, or the width isn't a multiple of it.
    """
    if heads is None:
        return weights
    known = weights.facts.heads
    if known not in (None, heads):
        raise ConfigError(f"heads is {heads}, but {weights.origin} has {known}; drop the flag")
    check_heads(weights, heads)
    return dataclasses.replace(weights, facts=weights.facts.replace(heads=heads))


def with_heads(source: WeightsSource, heads: int | None) -> WeightsSource:
    """Returns the source, whose encoders have these heads; itself if `heads` is None."""
    return source if heads is None else _Told(source, heads)


class _Told:
    """A source with another's weights."""

    def __init__(self, source: WeightsSource, heads: int) -> None:
        self._source, self._heads = source, heads
        self.origin, self.roles = source.origin, source.roles

    def encoder(self, which: str) -> Weights:
        return told_heads(self._source.encoder(which), self._heads)

    def predictor(self) -> dict[str, Tensor] | None:
        return self._source.predictor()

    def digest(self) -> str:
        return self._source.digest()


__all__ = ["check_heads", "told_heads", "with_heads"]

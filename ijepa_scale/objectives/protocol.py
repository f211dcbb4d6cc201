"""Defines the protocol of objectives, which the pretraining step calls. Must not know engines or processes."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.masks import Masks, Wanted
from ijepa_scale.registry import OBJECTIVES


class Objective(Protocol):
    """Compares predicted features with the target encoder's. Owns the loss, target normalisation and fused kernels."""

    Config: ClassVar[type[Any]]  # the section `objective` for this loss

    def __init__(self, config: Any, *, fused: bool = False) -> None:
        """Takes its section. With `fused`, one kernel computes the loss and reads the tokens once (CUDA only).

        Raises:
            ConfigError: this objective has no fused kernel.
        """

    def __call__(self, prediction: Tensor, tokens: Tensor, masks: Masks, wanted: Wanted) -> Tensor:
        """Returns the loss, an fp32 scalar, with gradients to `prediction`.

        `prediction` is the predictor's output, (M * E * B, T, D), or (R, D) if packed. `tokens` (B, U, D) is the
        target encoder's output at `wanted.patches`; `wanted.rows` (R,) is the index of each prediction's target in it.
        Doesn't synchronise.
        """


def build_objective(config: ObjectiveConfig, *, triton: tuple[str, ...] = ()) -> Objective:
    """Returns the objective that `config.loss` names; `triton` is `engine.triton`, the names of fused kernels.

    Raises:
        ConfigError: the name is unknown, or `triton` names target_loss and this objective has no fused kernel.
    """
    return OBJECTIVES.get(config.loss)(config, fused="target_loss" in triton)

"""Defines the protocol of objectives, which the pretraining step calls. Must not know engines or processes."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import Masks, Wanted
from ijepa_scale.registry import OBJECTIVES


class Objective(Protocol):
    """Compares predicted features with the target encoder's. Owns the loss, target normalisation and fused kernels."""

    Config: ClassVar[type[Any]]  # the section `objective` for this loss
    has_fused_kernel: ClassVar[bool]  # whether `fused` may be asked for; a class without it has none

    def __init__(self, config: Any, *, fused: bool = False) -> None:
        """Takes its section. With `fused`, one kernel computes the loss and reads the tokens once (CUDA only)."""

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
    kind, fused = OBJECTIVES.get(config.loss), "target_loss" in triton
    if fused and not getattr(kind, "has_fused_kernel", False):
        raise ConfigError(
            f"engine.triton names target_loss but objective.loss is {config.loss}, which has no fused kernel; remove "
            "target_loss from engine.triton"
        )
    return kind(config, fused=fused)

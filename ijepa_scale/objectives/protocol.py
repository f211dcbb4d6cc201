"""What the pretraining step asks of an objective. Knows no engine and no process."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.masks import Masks, Wanted
from ijepa_scale.registry import OBJECTIVES


class Objective(Protocol):
    """Compares predicted features with the target encoder's: owns loss, target normalisation and fused kernels."""

    Config: ClassVar[type[Any]]  # the section `objective` for this loss

    def __init__(self, config: Any, *, fused: bool = False) -> None:
        """Takes its section; `fused` asks for one kernel that reads the tokens once (CUDA).

        Raises:
            ConfigError: this objective has no fused kernel.
        """

    def __call__(self, prediction: Tensor, tokens: Tensor, masks: Masks, wanted: Wanted) -> Tensor:
        """Returns the loss, an fp32 scalar, with gradients to `prediction`.

        `prediction` is the predictor's output, (M * E * B, T, D), or (R, D) if packed. `tokens` (B, U, D) are the
        target encoder's at `wanted.places`, and `wanted.rows` (R,) tells which of them each prediction is for.
        Doesn't synchronise.
        """


def build_objective(config: ObjectiveConfig, *, triton: tuple[str, ...] = ()) -> Objective:
    """Returns the objective that `config.loss` names; `triton` are the kernels that `engine.triton` asks for.

    Raises:
        ConfigError: the name is unknown, or its loss has no fused kernel and one is asked for.
    """
    return OBJECTIVES.get(config.loss)(config, fused="target_loss" in triton)

"""Defines optimisers for engines. Each is a class in its own file, registered under an `optimizer.name`.

Must not know any engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ijepa_scale.config import OptimizerConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.groups import GroupFunction, check_groups
from ijepa_scale.registry import OPTIMIZERS


class OptimizerKind:
    """One kind of optimiser: builds it and tells engines its properties. Used as a class, without instances.

    `Config.state_names` are the names of its states, for planning too.
    """

    Config: ClassVar[type[OptimizerConfig]]  # the section `optimizer` for this kind

    @staticmethod
    def build(groups: list[dict[str, Any]], config: Any, *, offload: bool) -> torch.optim.Optimizer:
        """Returns the optimiser for groups of `params`, `decay` (bool) and, optionally, `lr_scale`; see `set_hyper`.

        Args:
            groups: hold each trainable parameter once. Under FSDP2 these are DTensors.
            config: an instance of `Config`.
            offload: whether states are in host memory (DeepSpeed CPU offload).

        Raises:
            ConfigError: a required package isn't installed.
        """
        raise NotImplementedError

    @classmethod
    def new_state(cls, parameter: Tensor) -> dict[str, Tensor]:
        """Returns a parameter's state before its first step, into which a checkpoint can be loaded."""
        return {name: torch.zeros_like(parameter) for name in cls.Config.state_names}

    @staticmethod
    def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets the step counter after a checkpoint was loaded. Optimisers without a counter ignore it."""

    @staticmethod
    def stopped_on_device(config: Any) -> bool:
        """Returns whether the optimiser changes nothing if its `found_inf`, () fp32 on the device, is 1."""
        return False

    @staticmethod
    def refusal(config: Any, strategy: str) -> str | None:
        """Returns why it can't run under a strategy (plain, ddp, fsdp2, zero1 to zero3), with the remedy, or None."""
        return config.refusal(int(strategy[-1])) if strategy.startswith("zero") else None


def optimizer_kind(config: OptimizerConfig, strategy: str) -> type[OptimizerKind]:
    """Returns the kind of optimiser that the section names.

    Raises:
        ConfigError: the name is unknown, the section belongs to another kind, or it can't run under the strategy.
    """
    kind: type[OptimizerKind] = OPTIMIZERS.get(config.name)
    if not isinstance(config, kind.Config):
        raise ConfigError(
            f"optimizer.name is {config.name} but the section is of type {type(config).__name__}; use "
            f"{kind.Config.__name__}"
        )
    if (reason := kind.refusal(config, strategy)) is not None:
        raise ConfigError(reason)
    return kind


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, groups: GroupFunction, strategy: str, offload: bool = False
) -> torch.optim.Optimizer:
    """Returns the optimiser that the section names, for the groups of a module that is on its device.

    Raises:
        ConfigError: as `optimizer_kind`, or a required package isn't installed.
        ValueError: a trainable parameter is in no group or in more than one.
    """
    kind = optimizer_kind(config, strategy)
    return kind.build(check_groups(module, groups(module)), config, offload=offload)


def check_states(config: OptimizerConfig, state: Mapping[str, Any]) -> None:
    """Compares a parameter's states with those that the section declares; others would be lost in a checkpoint.

    Raises:
        ConfigError: they differ.
    """
    found = {name for name, value in state.items() if isinstance(value, Tensor) and name != "step"}
    if found != {*config.state_names}:
        raise ConfigError(
            f"optimizer.name is {config.name}, which keeps the states {', '.join(sorted(found)) or '(none)'}, but "
            f"{type(config).__name__}.state_names are {', '.join(config.state_names) or '(none)'}; correct them"
        )

"""What an optimiser offers engines: each is a class in a file of its own, found by `optimizer.name`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ijepa_scale.config import OptimizerConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.groups import GroupFunction, check_groups
from ijepa_scale.registry import OPTIMIZERS


class OptimizerKind:
    """One optimiser: what makes it, and what engines must know of it. Its class is used; it has no instances.

    The names of its states are those of `Config.state_names`: the one table, which planning reads as well.
    """

    Config: ClassVar[type[OptimizerConfig]]  # its settings: the section `optimizer`

    @staticmethod
    def build(groups: list[dict[str, Any]], config: Any, *, offload: bool) -> torch.optim.Optimizer:
        """Returns the optimiser over groups of `params`, `decay` (bool) and perhaps `lr_scale`, set by `set_hyper`.

        Args:
            groups: each trainable parameter once; FSDP2's are DTensors.
            config: the section, a `Config`.
            offload: the states live in host memory (DeepSpeed CPU offload).

        Raises:
            ConfigError: what it needs isn't installed.
        """
        raise NotImplementedError

    @classmethod
    def new_state(cls, parameter: Tensor) -> dict[str, Tensor]:
        """Returns a parameter's state before its first step, so that a checkpoint has somewhere to be read to."""
        return {name: torch.zeros_like(parameter) for name in cls.Config.state_names}

    @staticmethod
    def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets the step counter after a checkpoint was read; does nothing where there is none."""

    @staticmethod
    def stopped_on_device(config: Any) -> bool:
        """Returns whether `optimizer.found_inf`, () fp32 on the device, keeps everything in place where it is 1."""
        return False

    @staticmethod
    def refusal(config: Any, strategy: str) -> str | None:
        """Returns why it can't run under a strategy (plain, ddp, fsdp2, zero1 to zero3), and the remedy; or None."""
        return config.refusal(int(strategy[-1])) if strategy.startswith("zero") else None


def optimizer_kind(config: OptimizerConfig, strategy: str) -> type[OptimizerKind]:
    """Returns the optimiser that the section names.

    Raises:
        ConfigError: there is none of that name, it has another section, or it can't run under the strategy.
    """
    kind: type[OptimizerKind] = OPTIMIZERS.get(config.name)
    if not isinstance(config, kind.Config):
        raise ConfigError(
            f"optimizer.name is {config.name} but its section is a {type(config).__name__}; make it a "
            f"{kind.Config.__name__}"
        )
    if (reason := kind.refusal(config, strategy)) is not None:
        raise ConfigError(reason)
    return kind


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, groups: GroupFunction, strategy: str, offload: bool = False
) -> torch.optim.Optimizer:
    """Returns the optimiser that the section names, over the groups of the module, which is on its device.

    Raises:
        ConfigError: as `optimizer_kind`, or something isn't installed.
        ValueError: the groups leave a trainable parameter out, or hold one twice.
    """
    kind = optimizer_kind(config, strategy)
    return kind.build(check_groups(module, groups(module)), config, offload=offload)

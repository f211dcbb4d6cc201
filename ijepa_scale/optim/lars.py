"""LARS: SGD with momentum whose steps are proportional to each weight's norm. Must not know processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from ijepa_scale.config import OptimizerConfig
from ijepa_scale.optim.kind import OptimizerKind


class LarsConfig(OptimizerConfig):
    """LARS: SGD with momentum, in which each weight's step is scaled by its norm over its gradient's."""

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    zero_reason: ClassVar[str] = "LARS needs the norm of each weight, but ZeRO stores slices of many flattened weights"

    name: str = Field("lars", description="Optimiser.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Share of the previous step that is kept.")
    trust_coefficient: float = Field(
        0.001, ge=0, description="Length of a step at learning rate 1, as a share of the weight's norm."
    )


class Lars(OptimizerKind):
    """LARS under plain, ddp and fsdp2."""

    Config = LarsConfig

    @staticmethod
    @override
    def build(groups: list[dict[str, Any]], config: LarsConfig, *, offload: bool) -> torch.optim.Optimizer:
        return LarsOptimizer(groups, lr=config.lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)

    @staticmethod
    @override
    def stopped_on_device(config: LarsConfig) -> bool:
        return True


class LarsOptimizer(torch.optim.Optimizer):
    """Updates weights w by v = momentum * v + q (g + decay * w), w = w - lr * v, where v starts at 0.

    q is trust_coefficient * |w| / |g + decay * w|, with norms of whole weights, or 1 if either norm is 0. In groups
    with `decay` false (biases and 1-D parameters) q is 1 and nothing decays. Doesn't synchronise. For sharded weights
    (FSDP2), one reduction per group sums the norms over processes.

    Source: arXiv 1708.03888, in the form of the released code of arXiv 2111.06377 (linear probing, appendix A.1). It
    differs from algorithm 1, which has |g| + decay * |w| in q, multiplies by lr within v, and treats 1-D parameters
    like the others.
    """

    found_inf: Tensor | None = None  # () fp32 on the device: if it is 1, nothing changes

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient, "decay": True}
        super().__init__(groups, {**settings, "weight_decay": weight_decay})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "closures aren't supported"
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if weights:
                self._update(group, weights, [weight.grad for weight in weights])

    def _update(self, group: dict[str, Any], weights: list[Tensor], updates: list[Tensor]) -> None:
        """Updates weights of one group; `updates` are their gradients."""
        if group["decay"]:
            updates = list(torch._foreach_add(updates, weights, alpha=group["weight_decay"]))
            ratios = _trust_ratios(weights, updates, group["trust_coefficient"])
            updates = [_local(update) for update in updates]
            torch._foreach_mul_(updates, ratios)  # () each, on the device
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
        torch._fused_sgd_(
            [_local(weight) for weight in weights],
            [_local(update) for update in updates],
            [_local(self.state[weight]["momentum_buffer"]) for weight in weights],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=self.found_inf,
        )


def _trust_ratios(weights: list[Tensor], updates: list[Tensor], coefficient: float) -> list[Tensor]:
    """Returns the factor () of each update. Reduces the norms of all sharded tensors together."""
    norms: Any = torch.stack(torch._foreach_norm([*weights, *updates]))
    if hasattr(norms, "full_tensor"):
        norms = norms.full_tensor()
    of_weights, of_updates = norms.chunk(2)
    known = (of_weights > 0) & (of_updates > 0)
    return list(torch.where(known, coefficient * of_weights / of_updates, 1.0).unbind())


def _local(tensor: Any) -> Tensor:
    """Returns this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

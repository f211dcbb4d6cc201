"""AdamW that moves the target and renews bf16 and fp8 copies in the same pass. Must not know processes or modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ijepa_kernels.fused_tail import Rates, Weight, fused_tail, prepare


class Companions(NamedTuple):
    """What moves with a parameter; see `ijepa_kernels.fused_tail.Weight`."""

    copy: Tensor | None = None
    target: Tensor | None = None
    target_copy: Tensor | None = None
    quantised: tuple[Tensor, Tensor] | None = None


class FusedTailAdamW(torch.optim.Optimizer):
    """AdamW with the state of `torch.optim.AdamW(fused=True)`, in one kernel for all groups. Doesn't synchronise.

    Sharded parameters (FSDP2) are updated shard by shard. Before `step`, set `momentum` if parameters have targets, and
    `gradient_scale` if gradients are clipped.
    """

    implementation = "triton"  # of `ijepa_kernels.fused_tail`
    found_inf: Tensor | None = None  # () fp32 on the device: unless it is 0, nothing moves
    gradient_scale: Tensor | None = None  # () fp32 on the device: multiplies all gradients
    momentum: float | None = None  # of the targets

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        new_state: Callable[[Tensor], dict[str, Tensor]],
    ) -> None:
        """`new_state` returns a parameter's state before its first step: exp_avg, exp_avg_sq and step."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._new_state = new_state
        self._companions: dict[Tensor, Companions] = {}
        self._held: list[Weight] | None = None  # without gradients; found at the first step
        self._table: Any = None

    def accompany(self, parameter: Tensor, companions: Companions) -> None:
        """Makes tensors move with a parameter. Call before the first step."""
        self._companions[parameter] = companions

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves all parameters, their states and companions.

        Raises:
            ValueError: a parameter has no gradient, or its memory was replaced after the first step.
        """
        assert closure is None, "closures aren't supported"
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self._held is None:
            self._held = self._weights()
            self._table = prepare(self._held) if self.implementation == "triton" else None
        if any(_address(p) != held.value.data_ptr() for p, held in zip(parameters, self._held, strict=True)):
            raise ValueError(
                "the parameters were moved to other memory after the first step; build the optimiser again"
            )
        missing = sum(parameter.grad is None for parameter in parameters)
        if missing:
            raise ValueError(
                f"{missing} of {len(parameters)} parameters have no gradient, but fused_tail moves all of them in each "
                "step; freeze those that the loss doesn't use, or set optimizer.impl=torch"
            )
        fused_tail(
            [held._replace(gradient=_local(p.grad)) for held, p in zip(self._held, parameters, strict=True)],
            [Rates(g["lr"], g["weight_decay"], tuple(g["betas"]), g["eps"]) for g in self.param_groups],
            momentum=self.momentum,
            stopped=self.found_inf,
            gradient_scale=self.gradient_scale,
            table=self._table,
            implementation=self.implementation,
        )

    def _weights(self) -> list[Weight]:
        weights = []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(self._new_state(parameter))
                value = _local(parameter)
                moments = [_local(state[name]) for name in ("exp_avg", "exp_avg_sq")]
                companions = self._companions.get(parameter, Companions())
                weights.append(Weight(value, value, *moments, _local(state["step"]), index, *companions))
        return weights


def _address(tensor: Any) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()


def _local(tensor: Any) -> Tensor:
    """Returns this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()

"""The tail of a step in one pass over the weights, for `optimizer.impl: fused_tail`.

The optimiser moves the target and renews all copies. It can do so only when the target's momentum is known, so the
engine takes the whole pass in `update_target`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ijepa_scale.engine.target import ReplicatedTarget
from ijepa_scale.engine.target_update import TargetUpdate
from ijepa_scale.optim.fused_tail import Companions, FusedTailAdamW


class FusedTail:
    """Moves the weights with their target, which follows `followed`, and their copies."""

    def __init__(
        self,
        optimizer: FusedTailAdamW,
        low_copies: dict[Tensor, Tensor],
        followed: Sequence[Tensor],
        shards: tuple[list[Tensor], list[Tensor]],
        replicated: ReplicatedTarget | None,
    ) -> None:
        """Tells the optimiser what moves with its parameters.

        Args:
            optimizer: of the trainable module.
            low_copies: of parameters: the bf16 copies that the module computes with.
            followed: the parameters that the target averages; none without a target.
            shards: this process's fp32 shards of the target and of `followed`, in their order.
            replicated: the target's own copies, if each process holds the whole target.
        """
        self._optimizer, self._replicated, self._update = optimizer, replicated, TargetUpdate()
        self._target, self._source = shards
        nothing: list[None] = [None] * len(followed)
        self._copies = replicated.copies if replicated else nothing
        quantised = replicated.quantised if replicated else nothing
        places = {parameter: index for index, parameter in enumerate(followed)}
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            companions = Companions(copy=low_copies.get(parameter))
            index = places.pop(parameter, None)
            if index is not None:
                companions = Companions(companions.copy, self._target[index], self._copies[index], quantised[index])
            optimizer.accompany(parameter, companions)
        self._frozen = list(places.values())  # the target follows frozen weights too, without the optimiser

    def move(self, momentum: float, stopped: Tensor | None) -> None:
        """Takes the optimiser's step and moves the target; see `Engine.step` and `Engine.update_target`."""
        self._optimizer.momentum = momentum
        self._optimizer.step()
        if self._frozen:
            target, source = ([tensors[index] for index in self._frozen] for tensors in (self._target, self._source))
            copies = [self._copies[index] for index in self._frozen]
            self._update(target, source, momentum, copies=copies, stopped=stopped)
            if self._replicated:
                self._replicated.updated(self._frozen)

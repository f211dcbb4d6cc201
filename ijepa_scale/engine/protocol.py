"""What every engine offers the training step.

The step knows these names alone; autocast, loss scaling by accumulation, gradient synchronisation, sharding and the
target's update are the engine's. Finetuning has no target, or an average of all its weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.world import World
from ijepa_scale.optim.groups import GroupFunction, parameter_groups
from ijepa_scale.schedules import Hyper


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What one optimiser step did."""

    loss: Tensor  # () fp32: this process's mean over its micro-batches, on the device
    grad_norm: Tensor | float  # global, before clipping
    stopped: Tensor | None = None  # () fp32 on the device: not 0 where a step was bad and nothing moves any more


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a full fp32 tensor that this process holds: elements [start, start + len) of it, flattened.

    `tensor` is a 1-D view into the engine's own memory, so that loading writes into it. Every engine
    cuts along the flattened tensor, so any engine can read what any other wrote.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]  # of the full tensor
    write: bool = True  # false: another process writes these elements; this one only reads them


class Engine(Protocol):
    """One way of spreading a training step over processes."""

    world: World
    triton: tuple[str, ...]  # kernels that the step takes from Triton

    @abstractmethod
    def prepare(
        self,
        module: nn.Module,
        target: nn.Module | None = None,
        *,
        groups: GroupFunction = parameter_groups,
        followed: str = "encoder",
    ) -> None:
        """Takes over the trainable and the frozen module, if there is one, both built on the CPU from one seed.

        `followed` names the part of the trainable module that the target averages; "" is all of it.
        `groups` cuts the trainable module into the optimiser's groups. Parameters without gradients stay as
        they are; they are sharded, saved and loaded as the others.
        """

    @abstractmethod
    def model(self, *args: Any) -> Tensor:
        """Returns the trainable module's output, under the engine's precision."""

    @abstractmethod
    def evaluate(self, *args: Any) -> Tensor:
        """Returns the trainable module's output in evaluation mode, without gradients, under the engine's precision.

        Communicates where weights are sharded: then every process calls it equally often. Use it, not `model`,
        outside training steps: it leaves weights sharded, as saving and stepping need them.
        """

    @abstractmethod
    def target(self, *args: Any, **options: Any) -> Tensor:
        """Returns the target encoder's output, without gradients, under the engine's precision."""

    @abstractmethod
    def check_fp8(self, images: Tensor) -> None:
        """Compares the fp8 target's features of `images` (B, 3, H, W) with bf16 ones, where fp8 is asked for.

        Raises:
            ConfigError: they are too far apart.
        """

    @abstractmethod
    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yields the micro-batches, on the device; gradients are reduced when they have to be."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's mean loss, scaled for accumulation."""

    @abstractmethod
    def step(self, hyper: Hyper, step: int) -> StepInfo:
        """Moves the trainable weights, or stops every process before anything has moved.

        On a GPU the host isn't told at once: nothing moves from the bad step on, and the next step or `settle`
        raises. A group's learning rate is `hyper.lr` times its `lr_scale`; weight decay spares groups that don't decay.

        Raises:
            NonFiniteError: a loss or the gradient norm is NaN or infinite on some process.
        """

    @abstractmethod
    def update_target(self, momentum: float, info: StepInfo) -> None:
        """Moves the target to momentum * target + (1 - momentum) * followed weights: exactly, in fp32, in place.

        `info` is what the step before it returned: where that one was stopped, nothing moves. Neither communicates
        nor, under the native engines, synchronises.
        """

    @abstractmethod
    def settle(self) -> None:
        """Raises what the last step left to be read; call it before the state is saved, shown or evaluated.

        Raises:
            NonFiniteError: as `step`, naming the step that was bad.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Returns all state this process must save, each element on at least one process."""

    @abstractmethod
    def loaded(self, optimizer_step: int) -> None:
        """Is told that `pieces` have been filled from a checkpoint taken after that many optimiser steps."""

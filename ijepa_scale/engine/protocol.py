"""Defines the protocol of engines, which the training step calls.

The step knows only this protocol. The engine does autocast, loss scaling for accumulation, gradient synchronisation,
sharding and the target's update. In finetuning there is no target, or the target is an average of all weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.optim.groups import GroupFunction, parameter_groups
from ijepa_scale.schedules import Hyper


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """The result of one optimiser step."""

    loss: Tensor  # () fp32 on the device: the mean over this process's micro-batches
    grad_norm: Tensor | float  # global, before clipping
    block_norms: dict[str, Tensor] | None = None  # of the gradient, before clipping, where asked for
    stopped: Tensor | None = None  # () fp32 on the device: not 0 if this step is left out, so nothing moved
    leaving: bool = False  # some process was asked to stop; true from the same step on on every process


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This process's part of a full fp32 tensor: the elements [start, start + len) of the flattened tensor.

    `tensor` is a 1-D view of the engine's memory, so loading writes into the engine. Every engine splits flattened
    tensors, so every engine can load what another one saved.
    """

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]  # of the full tensor
    share: tuple[int, int] = (0, 1)  # (i, n): n processes hold these elements, of which this one saves share i


class Engine(Protocol):
    """Runs a training step on one or many processes."""

    world: World
    triton: tuple[str, ...]  # names of the Triton kernels that the step uses
    attention: dict[str, str]  # the kernel of each network's dense attention, by role; known once prepared
    before_waiting: Callable[[], None]  # called at least once in a step, before it may first wait for other processes

    @abstractmethod
    def prepare(
        self,
        module: nn.Module,
        target: nn.Module | None = None,
        *,
        groups: GroupFunction = parameter_groups,
        followed: str = "encoder",
    ) -> None:
        """Moves the modules to the device, distributes them and builds the optimiser.

        Args:
            module: the trainable module, built on the CPU with the same seed on every process.
            target: the frozen module, if any, built in the same way.
            groups: splits the trainable module into the optimiser's groups. Frozen parameters of the module don't
                change, but are sharded, saved and loaded like the others.
            followed: name of the submodule of `module` that the target averages; "" is the whole module.
        """

    @abstractmethod
    def model(self, *args: Any) -> Tensor:
        """Returns the output of the trainable module in the engine's precision."""

    @abstractmethod
    def evaluate(self, *args: Any) -> Tensor:
        """Returns the output of the trainable module in evaluation mode, without gradients, in the engine's precision.

        Communicates if weights are sharded, so every process must call it the same number of times. Use it instead of
        `model` outside training steps: it leaves weights sharded, as saving and stepping need them.
        """

    @abstractmethod
    def target(self, *args: Any, **options: Any) -> Tensor:
        """Returns the target encoder's output, without gradients, in the engine's precision."""

    @abstractmethod
    def check_fp8(self, images: Tensor) -> None:
        """Compares features of `images` (B, 3, H, W) in fp8 and in bf16, if the target's precision is fp8.

        Raises:
            ConfigError: they differ too much.
        """

    @abstractmethod
    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yields the micro-batches on the device, and makes backward reduce gradients when necessary."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a micro-batch's mean loss, divided by the number of micro-batches."""

    @abstractmethod
    def step(self, hyper: Hyper, step: int, *, by_block: bool = False) -> StepInfo:
        """Updates the trainable weights, or stops every process before anything has changed.

        `by_block` asks for the gradient's norm in each block too. It doesn't synchronise; sharded engines then gather
        one number per block.

        On a GPU the host learns of a bad step later: that step changes nothing, and the next step or `settle` raises
        before anything else has changed. A step that is left out (see `judged_by`) changes nothing either, and leaves
        no gradients. A group's learning rate is `hyper.lr` times its `lr_scale`. Weight decay applies only to groups
        that decay. If there is a target, `update_target` must follow: an engine may move weights and target together.

        Raises:
            NonFiniteError: a loss or the gradient norm is NaN or infinite on some process.
            SpikeError: the judge ends the run.
        """

    @abstractmethod
    def judged_by(self, judge: SpikeJudge) -> None:
        """Lets a judge decide on the steps from now on. Without one, the first value that isn't finite raises."""

    @abstractmethod
    def update_target(self, momentum: float, info: StepInfo) -> None:
        """Sets the target to momentum * target + (1 - momentum) * followed weights, in fp32 and in place.

        `info` is the result of the preceding `step`; if that step was stopped, the target stays the same. Doesn't
        communicate and, in the native engines, doesn't synchronise.
        """

    @abstractmethod
    def settle(self) -> None:
        """Raises the error of a bad last step. Call before the state is saved, reported or evaluated.

        Raises:
            NonFiniteError: as `step`; names the bad step.
            SpikeError: as `step`.
        """

    @abstractmethod
    def pieces(self, *, working: bool = False) -> list[Piece]:
        """Returns the state that this process holds. Every element is on at least one process.

        With `working`, also the fp32 copies of weights that forward passes use, if those aren't the state itself; they
        are for comparing, not for saving.
        """

    @abstractmethod
    def loaded(self, optimizer_step: int) -> None:
        """Call after `pieces` were loaded from a checkpoint that was saved after `optimizer_step` optimiser steps."""

"""The part that all engines share: preparing modules, autocast, evaluation, the target and its update, pieces.

It must not know how an engine distributes weights or stores gradients and optimiser states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ijepa_scale.config import EngineConfig, OptimizerConfig
from ijepa_scale.engine.attention import use_attention
from ijepa_scale.engine.block_norms import BlockNorms
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.graphs import target_forward
from ijepa_scale.engine.norms import use_layer_norm
from ijepa_scale.engine.parallelize import checkpoint_blocks
from ijepa_scale.engine.protocol import Engine, Piece, StepInfo
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.target import NO_FP8, ReplicatedTarget, check_fp8
from ijepa_scale.engine.target_update import TargetUpdate
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.groups import GroupFunction, clean_name, parameter_groups


class BaseEngine(Engine):
    """The base of all engines. Subclasses add `_distribute`, the model's forward, the step and the sharding of tensors.

    The key method is `_local_shards`. It returns this process's fp32 tensors of the target and of the weights that it
    follows, sharded the same way and in the same order. So under every engine the target's update is one operation
    without communication.
    """

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig, *, late: bool = False) -> None:
        """With `late`, a flag on the device stops the optimiser, and the host reads the finite check one step later."""
        self.world = world
        self.triton: tuple[str, ...] = config.triton
        self.before_waiting = _nothing
        self._config = config
        self._optimizer_config = optimizer
        self._watch = FiniteWatch(world, late=late)
        self._update = TargetUpdate("triton" if "target_update" in config.triton else "auto")
        self._autocast = torch.autocast(
            world.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        )  # entered again for each forward

    @property
    def _sharding(self) -> str | None:
        """The reason why the target's weights are sharded, for messages. None if each process holds all of them."""
        return None

    @override
    def prepare(
        self,
        module: nn.Module,
        target: nn.Module | None = None,
        *,
        groups: GroupFunction = parameter_groups,
        followed: str = "encoder",
    ) -> None:
        if self._sharding is not None and self._config.target_precision == "fp8":
            raise ConfigError(f"engine.target_precision is fp8 but {self._sharding}: {NO_FP8}")
        self.attention = use_attention(self._config, module, target, self.world)
        use_layer_norm(self._config, self.world.device, module, target)
        checkpoint_blocks(module, self._config.checkpointing)
        self.module: Any = module.to(self.world.device)
        self._followed: nn.Module = module.get_submodule(followed)
        self.target_module: Any = None
        self._replicated: ReplicatedTarget | None = None  # set if each process holds the whole target
        if target is not None:
            self.target_module = target.to(self.world.device).requires_grad_(False).eval()
            if self._sharding is None:
                precision = self._config.target_precision or self._config.precision
                fast = self._config.fp8_fast_accumulation
                self._replicated = ReplicatedTarget(target, precision=precision, fast_accumulation=fast)
        self._target_callable: Any = target_forward(
            self._config, target, self.world.device, sharded=self._sharding is not None
        )
        self._distribute(groups)
        self._blocks = BlockNorms(self.module, self.world.device)

    @abstractmethod
    def _distribute(self, groups: GroupFunction) -> None:
        """Compiles and distributes `module` and `target_module`, and builds the optimiser."""

    @override
    @torch.no_grad()
    def evaluate(self, *args: Any) -> Tensor:
        training = self.module.training
        self.module.eval()
        try:
            return self._evaluate(*args)
        finally:
            self.module.train(training)

    @abstractmethod
    def _evaluate(self, *args: Any) -> Tensor:
        """Returns the output of the trainable module, already in evaluation mode, in the engine's precision."""

    @override
    @torch.no_grad()
    def target(self, *args: Any, **options: Any) -> Tensor:
        assert self.target_module is not None, "prepare() was given no target"
        self._before_forward()
        with self._autocast:
            return self._target_callable(*args, **options)

    def _before_forward(self) -> None:
        if self._sharding is not None:  # a forward gathers weights
            self.before_waiting()

    @override
    def check_fp8(self, images: Tensor) -> None:
        if self._replicated and self._config.target_precision == "fp8":
            check_fp8(self._replicated, images, self.world)

    @override
    def judged_by(self, judge: SpikeJudge) -> None:
        self._watch.judge = judge

    @override
    def settle(self) -> None:
        self._watch.settle()

    @override
    def update_target(self, momentum: float, info: StepInfo) -> None:
        assert self.target_module is not None, "prepare() was given no target"
        copies = self._replicated.copies if self._replicated else ()
        self._update(*self._local_shards(), momentum, copies=copies, stopped=info.stopped)
        self._target_updated()

    def _local_shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns this process's fp32 shards of the target and of the weights it follows, split alike and in order."""
        if self._replicated:
            shards = self._replicated.shards
        else:
            shards = [self._local(parameter) for parameter in self.target_module.parameters()]
        return shards, [self._local(parameter) for parameter in self._followed.parameters()]

    def _local(self, parameter: Any) -> Tensor:
        """Returns this process's part of a parameter: a detached view of the engine's memory."""
        return parameter.detach()

    def _target_updated(self) -> None:
        """Called after the target's update. Renews fp8 copies of weights; the update itself renews bf16 copies."""
        if self._replicated:
            self._replicated.updated()

    @override
    def pieces(self, *, working: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        for name, parameter in self.module.named_parameters():
            name = clean_name(name)
            if parameter.requires_grad:
                pieces.extend(self._trained_pieces(name, parameter))
            else:  # frozen parameters have no optimiser state
                pieces.append(self._piece(f"model.{name}", parameter))
        return [*pieces, *(self._piece(f"target.{clean_name(name)}", value) for name, value in self._target_values())]

    def _target_values(self) -> Iterable[tuple[str, Tensor]]:
        if self._replicated:
            return self._replicated.values.items()
        return () if self.target_module is None else self.target_module.named_parameters()

    @abstractmethod
    def _trained_pieces(self, name: str, parameter: Any) -> Iterator[Piece]:
        """Yields this process's parts of a trained parameter and its optimiser states, and creates missing states."""

    def _piece(self, name: str, tensor: Any) -> Piece:
        """Returns the piece of a tensor that every process holds as a whole; each saves a share."""
        return Piece(
            name=name,
            tensor=tensor.detach().view(-1),
            start=0,
            shape=tuple(tensor.shape),
            share=(self.world.rank, self.world.size),
        )


def _nothing() -> None:
    """Stands for a function that nobody has set."""

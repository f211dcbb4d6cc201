"""The engines that need only PyTorch: one process, DDP, FSDP2 and HSDP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ijepa_scale.config import EngineConfig, OptimizerConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.base import BaseEngine
from ijepa_scale.engine.low_copies import renew, use_low_copies
from ijepa_scale.engine.parallelize import blocks, compile_parts
from ijepa_scale.engine.protocol import Piece, StepInfo
from ijepa_scale.engine.tail import FusedTail
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.fused_tail import FusedTailAdamW
from ijepa_scale.optim.groups import GroupFunction, set_hyper
from ijepa_scale.optim.kind import build_optimizer, check_states, optimizer_kind
from ijepa_scale.schedules import Hyper


class NativeEngine(BaseEngine):
    """The base of this module's engines: PyTorch's autograd, clipping and optimiser."""

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        self._kind = optimizer_kind(optimizer, config.strategy)
        # if no flag on the device can stop the optimiser, the host reads the result before the optimiser runs
        late = world.device.type == "cuda" and self._kind.stopped_on_device(optimizer)
        super().__init__(world, config, optimizer, late=late)
        self._reduces = True  # whether the next backward reduces gradients

    @override
    def _distribute(self, groups: GroupFunction) -> None:
        low = self._optimizer_config.renews_copies and self._config.precision == "bf16"
        low = low and self._sharding is None  # FSDP2 gathers weights in bf16 already
        self._low_copies = use_low_copies(self.module) if low else {}
        compile_parts(self._config, self.module, self.target_module)
        self._wrap()
        self.optimizer = build_optimizer(
            self.module, self._optimizer_config, groups=groups, strategy=self._config.strategy
        )
        self._shards = ([], []) if self.target_module is None else super()._local_shards()
        self._tail: FusedTail | None = None
        self._moves_later = False  # between `step` and `update_target`, if the tail is to move weights and target
        if isinstance(self.optimizer, FusedTailAdamW):
            followed = [] if self.target_module is None else list(self._followed.parameters())
            self._tail = FusedTail(self.optimizer, self._low_copies, followed, self._shards, self._replicated)

    def _wrap(self) -> None:
        self._callable: Any = self.module

    @override
    def model(self, *args: Any) -> Tensor:
        self._before_forward()
        with self._autocast:
            return self._callable(*args)

    @override
    def _evaluate(self, *args: Any) -> Tensor:
        with self._autocast:
            return self.module(*args)

    @override
    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        parts = self._config.accumulation
        for index, micro in enumerate(batch.split(parts)):
            self._reduces = index == parts - 1  # on the last one only
            self._reduce_gradients(self._reduces)
            yield micro.to(self.world.device)

    def _reduce_gradients(self, reduce: bool) -> None:
        """Sets whether the next backward reduces gradients over the processes."""

    @override
    def backward(self, loss: Tensor) -> None:
        self._watch.record(loss)
        if self._reduces:
            self.before_waiting()
        (loss / self._config.accumulation).backward()

    @override
    def step(self, hyper: Hyper, step: int, *, by_block: bool = False) -> StepInfo:
        assert not self._moves_later, "update_target must follow each step"
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss = self._watch.take()
        stopped = self._watch.check(step, loss, norm)
        block_norms = self._block_norms() if by_block else None
        self._moves_later = not self._watch.left_out and self._tail is not None and self.target_module is not None
        if not self._watch.left_out:
            self._clip(parameters, norm)
            set_hyper(self.optimizer.param_groups, hyper)
            if stopped is not None:
                self.optimizer.found_inf = stopped  # type: ignore[attr-defined]  # stops fused kernels
            if not self._moves_later:
                self.optimizer.step()
        if not self._moves_later:
            self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(
            loss=loss, grad_norm=norm, block_norms=block_norms, stopped=stopped, leaving=self._watch.leaving
        )

    def _block_norms(self) -> dict[str, Tensor]:
        return self._blocks([p.grad for p in self.module.parameters() if p.requires_grad])

    def _clip(self, parameters: list[nn.Parameter], norm: Tensor) -> None:
        """Clips the gradients, whose norm is `norm`, or leaves it to the tail."""
        largest = self._optimizer_config.clip_norm
        if largest is None:
            return
        if isinstance(self.optimizer, FusedTailAdamW):
            self.optimizer.gradient_scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch's clipping
        else:
            nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)

    @override
    def update_target(self, momentum: float, info: StepInfo) -> None:
        if self._tail is None or not self._moves_later:
            super().update_target(momentum, info)
            return
        self._tail.move(momentum, info.stopped)
        self.optimizer.zero_grad(set_to_none=True)
        self._moves_later = False

    @override
    def _local_shards(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._shards  # collected once: they never move, and collecting them takes host time in each step

    @override
    def _trained_pieces(self, name: str, parameter: Any) -> Iterator[Piece]:
        assert not self._moves_later, "the state can't be saved between step and update_target"
        yield self._piece(f"model.{name}", parameter)
        state = self.optimizer.state[parameter]
        if not state:  # before the first step: create it, so that loading has memory to write to
            state.update(self._kind.new_state(parameter))
        check_states(self._optimizer_config, state)
        for key in self._optimizer_config.state_names:
            yield self._piece(f"optimizer.{key}.{name}", state[key])

    @override
    def loaded(self, optimizer_step: int) -> None:
        self._kind.set_step(self.optimizer, optimizer_step)
        renew(self._low_copies)
        if self._replicated:
            self._replicated.loaded()


class PlainEngine(NativeEngine):
    """One process, without any wrapper."""

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        if world.size > 1:
            raise ConfigError(
                f"engine.strategy is plain but {world.size} processes are running; use ddp, fsdp2 or deepspeed, "
                "or start one process"
            )
        super().__init__(world, config, optimizer)


class DdpEngine(NativeEngine):
    """Replicated weights; gradients are averaged while backward runs."""

    @override
    def _wrap(self) -> None:
        self._callable = DistributedDataParallel(
            self.module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False
        )

    @override
    def _reduce_gradients(self, reduce: bool) -> None:
        self._callable.require_backward_grad_sync = reduce


class Fsdp2Engine(NativeEngine):
    """Sharded weights, gradients, optimiser states and target, over all processes or within groups of them (HSDP)."""

    @property
    @override
    def _sharding(self) -> str:
        return "strategy is fsdp2"

    @override
    def _wrap(self) -> None:
        size, replicas = self.world.size, self._config.replicas
        if size % replicas:
            raise ConfigError(
                f"{size} processes can't be divided into engine.replicas {replicas}; choose a divisor of {size}"
            )
        kind = self.world.device.type
        if replicas > 1:
            mesh = init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        self._mesh = mesh
        low = torch.bfloat16 if self._config.precision == "bf16" else None
        # inputs aren't cast, so the residual stream stays fp32, as under autocast in the other engines
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        reshard = self._config.reshard_after_forward
        for block in blocks(self.module):
            frozen = not any(
                p.requires_grad for p in block.parameters()
            )  # no backward frees its gathered weights, see below
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard or frozen)
        fully_shard(self.module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if self.target_module is not None:
            # The target never runs backward, which would free its gathered weights. If they stayed gathered, its next
            # output would be stale.
            for block in blocks(self.target_module):
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            fully_shard(self.target_module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self._callable = self.module

    @override
    def _evaluate(self, *args: Any) -> Tensor:
        output = super()._evaluate(*args)
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # since no backward follows
        return output

    @override
    def _reduce_gradients(self, reduce: bool) -> None:
        self.module.set_requires_gradient_sync(reduce)

    @override
    def _block_norms(self) -> dict[str, Tensor]:
        gradients = [p.grad for p in self.module.parameters() if p.requires_grad]
        parts = [None if gradient is None else gradient.to_local() for gradient in gradients]
        squares = self.world.gather(self._blocks.squares(parts)).sum(dim=0) / self._config.replicas
        return self._blocks.norms(squares)

    @override
    def _local(self, parameter: Any) -> Tensor:
        return parameter.detach().to_local()

    @override
    def _piece(self, name: str, tensor: Any) -> Piece:
        assert isinstance(tensor, DTensor)
        shard_size, shard_rank = self._mesh["shard"].size(), self._mesh["shard"].get_local_rank()
        rows = tensor.shape[0] if tensor.ndim else 1
        rows_each = -(-rows // shard_size)
        row_numel = tensor.numel() // max(rows, 1)
        local = tensor.to_local().detach()
        assert local.numel() == max(0, min(rows_each, rows - shard_rank * rows_each)) * row_numel
        return Piece(
            name=name,
            tensor=local.view(-1),
            start=min(shard_rank * rows_each, rows) * row_numel,
            shape=tuple(tensor.shape),
            share=(self.world.rank // shard_size, self._config.replicas),
        )

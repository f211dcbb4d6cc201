"""The engines that PyTorch alone provides: one process, DDP, FSDP2 and HSDP."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ijepa_scale.config import EngineConfig, OptimizerConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.attention import use_attention
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.graphs import target_forward
from ijepa_scale.engine.norms import use_layer_norm
from ijepa_scale.engine.parallelize import blocks, checkpoint_blocks, compile_parts
from ijepa_scale.engine.protocol import Piece, StepInfo
from ijepa_scale.engine.target import NO_FP8, HoldsTarget, ReplicatedTarget
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.adamw import GroupFunction, build_optimizer, clean_name, parameter_groups, set_hyper, set_step
from ijepa_scale.schedules import Hyper

logger = logging.getLogger(__name__)


class PlainEngine(HoldsTarget):
    """One process, no wrapping; also the base of the other engines of this module."""

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        if world.size > 1 and type(self) is PlainEngine:
            raise ConfigError(
                f"engine.strategy is plain but {world.size} processes are running; use ddp, fsdp2 or deepspeed, "
                "or start one process"
            )
        self.world = world
        self.triton: tuple[str, ...] = config.triton
        self._config = config
        self._optimizer_config = optimizer
        # torch's fused AdamW takes the flag on the device; for other kernels the host reads it before they run
        self._watch = FiniteWatch(
            world, late=world.device.type == "cuda" and getattr(optimizer, "impl", None) in ("auto", "torch")
        )
        self._autocast = torch.autocast(
            world.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        )  # re-entered at each forward

    def prepare(
        self,
        module: nn.Module,
        target: nn.Module | None = None,
        *,
        groups: GroupFunction = parameter_groups,
        followed: str = "encoder",
    ) -> None:
        """Moves the modules to the device, and applies checkpointing, compilation and wrapping."""
        use_attention(self._config, module, target, self.world)
        use_layer_norm(self._config, self.world.device, module, target)
        checkpoint_blocks(module, self._config.checkpointing)
        compile_parts(self._config, module, target)
        self.module: Any = module.to(self.world.device)
        self.target_module: Any = None
        self._replicated: ReplicatedTarget | None = None
        if target is not None:
            self.target_module = target.to(self.world.device).requires_grad_(False).eval()
            self._replicated = self._replicate(target)
        self._wrap()
        self._target_forward = target_forward(self._config, self.target_module, self.world.device)
        self.optimizer = build_optimizer(self.module, self._optimizer_config, groups=groups)
        self._shards: tuple[list[Tensor], list[Tensor]] = [], []
        if target is not None:
            sources = [_local(p) for p in self.module.get_submodule(followed).parameters()]
            kept = self._replicated
            self._shards = kept.shards if kept else [_local(p) for p in self.target_module.parameters()], sources

    def _wrap(self) -> None:
        self._callable: Any = self.module

    def model(self, *args: Any) -> Tensor:
        """Returns the trainable module's output."""
        with self._autocast:
            return self._callable(*args)

    @torch.no_grad()
    def evaluate(self, *args: Any) -> Tensor:
        """Returns the trainable module's output in evaluation mode, without gradients."""
        training = self.module.training
        self.module.eval()
        with self._autocast:
            output = self.module(*args)
        self.module.train(training)
        return output

    @torch.no_grad()
    def target(self, *args: Any, **options: Any) -> Tensor:
        """Returns the target encoder's output, without gradients."""
        assert self.target_module is not None, "prepare() was given no target"
        with self._autocast:
            return self._target_forward(*args, **options)

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yields the micro-batches on the device; gradients are reduced on the last one."""
        parts = self._config.accumulation
        for index, micro in enumerate(batch.split(parts)):
            self._reduce_gradients(index == parts - 1)
            yield micro.to(self.world.device)

    def _reduce_gradients(self, reduce: bool) -> None:
        """Sets whether the coming backward reduces gradients over the processes."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's mean loss."""
        self._watch.record(loss)
        (loss / self._config.accumulation).backward()

    def step(self, hyper: Hyper, step: int) -> StepInfo:
        """Moves the trainable weights, or stops every process before anything has moved."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss = self._watch.take()
        stopped = self._watch.check(step, loss, norm)
        if self._optimizer_config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._optimizer_config.clip_norm, norm, foreach=True)
        set_hyper(self.optimizer.param_groups, hyper)
        if stopped is not None:
            self.optimizer.found_inf = stopped  # type: ignore[attr-defined]  # the fused kernel's way to be stopped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(loss=loss, grad_norm=norm, stopped=stopped)

    def settle(self) -> None:
        """Raises what the last step left to be read."""
        self._watch.settle()

    def local_shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns this process's fp32 shards of (target encoder, context encoder)."""
        return self._shards

    def target_updated(self) -> None:
        """Quantises weights that have an fp8 copy; others are the shards themselves or were rounded with them."""
        if self._replicated:
            self._replicated.updated()

    def pieces(self) -> list[Piece]:
        """Returns this process's parts of weights, optimiser states and target."""
        pieces = []
        for name, parameter in self.module.named_parameters():
            name = clean_name(name)
            pieces.append(self._piece(f"model.{name}", parameter))
            if not parameter.requires_grad:  # frozen: no optimiser state
                continue
            state = self.optimizer.state[parameter]
            if not state:  # before the first step: made here, so that loading has somewhere to write
                state["step"] = torch.zeros((), device=self.world.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            pieces += [self._piece(f"optimizer.{key}.{name}", state[key]) for key in ("exp_avg", "exp_avg_sq")]
        if self.target_module is not None:
            kept = self._replicated.values if self._replicated else dict(self.target_module.named_parameters())
            pieces += [self._piece(f"target.{clean_name(name)}", value) for name, value in kept.items()]
        return pieces

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        return Piece(
            name=name,
            tensor=tensor.detach().view(-1),
            start=0,
            shape=tuple(tensor.shape),
            write=self.world.is_main,
        )

    def loaded(self, optimizer_step: int) -> None:
        """Sets Adam's step counter, and renews what is computed from the target's values."""
        set_step(self.optimizer, optimizer_step)
        if self._replicated:
            self._replicated.loaded()


class DdpEngine(PlainEngine):
    """Replicated weights, gradients averaged while backward runs."""

    def _wrap(self) -> None:
        self._callable = DistributedDataParallel(
            self.module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=False
        )

    def _reduce_gradients(self, reduce: bool) -> None:
        self._callable.require_backward_grad_sync = reduce


class Fsdp2Engine(PlainEngine):
    """Sharded weights, gradients, optimiser and target; over all processes, or within groups of them (HSDP)."""

    def _replicate(self, target: nn.Module) -> ReplicatedTarget | None:
        if self._config.target_precision == "fp8":
            raise ConfigError(f"engine.target_precision is fp8 but strategy is fsdp2: {NO_FP8}")
        return None

    def _wrap(self) -> None:
        size, replicas = self.world.size, self._config.replicas
        if size % replicas:
            raise ConfigError(
                f"{size} processes don't split into engine.replicas {replicas}; choose a divisor of {size}"
            )
        kind = self.world.device.type
        if replicas > 1:
            mesh = init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        self._mesh = mesh
        low = torch.bfloat16 if self._config.precision == "bf16" else None
        # inputs aren't cast: the residual stream stays fp32, as under autocast everywhere else
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        reshard = self._config.reshard_after_forward
        for block in blocks(self.module):
            frozen = not any(p.requires_grad for p in block.parameters())  # no backward will free it, see below
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard or frozen)
        fully_shard(self.module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if self.target_module is not None:
            # The target never runs backward, so nothing but this frees its gathered weights: left gathered, its
            # next output would be stale.
            for block in blocks(self.target_module):
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            fully_shard(self.target_module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self._callable = self.module

    def evaluate(self, *args: Any) -> Tensor:
        """Returns the trainable module's output in evaluation mode, without gradients; shards the weights again."""
        output = super().evaluate(*args)
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # as no backward follows
        return output

    def _reduce_gradients(self, reduce: bool) -> None:
        self.module.set_requires_gradient_sync(reduce)

    def _piece(self, name: str, tensor: Tensor) -> Piece:
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
            write=self.world.rank < shard_size,  # the first replica
        )


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()

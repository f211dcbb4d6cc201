"""The DeepSpeed engine: ZeRO stages 1, 2 and 3, each with an exact EMA target.

Parameters and optimiser states are fp32 in every precision; bf16 uses DeepSpeed's `torch_autocast`. So the target's
shards are fp32 too, and its update is local: stage 3 shards target and encoder in the same way, and stages 1 and 2
replicate both. Communication is fp32 as well, unless `zero_communication` is bf16. Only the target's weights, which
have no gradients, are always gathered in bf16 under bf16 precision.

This module uses attributes of DeepSpeed that aren't public (`grad_position`, `fp32_partitioned_groups_flat`,
`single_partition_of_fp32_groups`, `_hp_mapping`). The version is pinned, and tests cover each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ijepa_scale import environment
from ijepa_scale.config import EngineConfig, OptimizerConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.base import BaseEngine
from ijepa_scale.engine.ds_config import LOW_PRECISION_LAYERS, compose, load_ds_config
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.parallelize import blocks, compile_parts
from ijepa_scale.engine.protocol import Piece, StepInfo
from ijepa_scale.engine.world import World
from ijepa_scale.optim.groups import GroupFunction, clean_name, set_hyper
from ijepa_scale.optim.kind import build_optimizer, check_states, optimizer_kind
from ijepa_scale.schedules import Hyper


def import_deepspeed(device: torch.device) -> Any:
    """Imports and returns `deepspeed`, with fewer log messages and without its run-time compilation for CPUs."""
    environment.export_accelerator(device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # compiling its shared-memory all-reduce takes a minute, and gloo works without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _require_input_gradients(module: nn.Module) -> None:
    """Makes the input of every trainable part require a gradient if the module has frozen parameters.

    If the input of a part needs no gradient, stage 3 considers the part's backward done before it has begun and frees
    its weights. The first trainable block after frozen ones would then find no weights.
    """
    if all(parameter.requires_grad for parameter in module.parameters()):
        return
    whole = blocks(module)
    inside = {id(child) for block in whole for child in block.modules()}
    outside = [part for part in module.modules() if id(part) not in inside and list(part.parameters(recurse=False))]
    for part in (*whole, *outside):
        if any(parameter.requires_grad for parameter in part.parameters()):
            part.register_forward_pre_hook(_require_gradient)


def _require_gradient(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and not args[0].requires_grad:
        args[0].requires_grad_()


class ZeroEngine(BaseEngine):
    """DeepSpeed ZeRO over all processes."""

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        assert config.ds_config is not None
        super().__init__(world, config, optimizer)
        self._watch = FiniteWatch(world, in_parts=True)
        environment.export_accelerator(
            world.device.type
        )  # loading the file imports deepspeed, which picks an accelerator
        self._plan = load_ds_config(config.ds_config)
        self._stage = int(self._plan["zero_optimization"]["stage"])
        self._kind = optimizer_kind(optimizer, f"zero{self._stage}")

    @property
    @override
    def _sharding(self) -> str | None:
        return "the ZeRO stage is 3" if self._stage == 3 else None

    @override
    def _distribute(self, groups: GroupFunction) -> None:
        deepspeed = import_deepspeed(self.world.device)
        parts = [part for part in (self.module, self.target_module) if part is not None]
        settings = compose(
            self._plan,
            micro_batch=1,  # only its throughput log reads it
            accumulation=self._config.accumulation,
            clip_norm=self._optimizer_config.clip_norm,
            precision=self._config.precision,
            world=self.world.size,
            communication=self._config.zero_communication,
        )
        if self._stage == 3:
            # gathers weights once per block, and allows compiled blocks under ZeRO-3
            for part in parts:
                deepspeed.utils.set_z3_leaf_modules(part, [type(block) for block in blocks(part)[:1]])
            _require_input_gradients(self.module)
        offload = "offload_optimizer" in self._plan["zero_optimization"]
        optimizer = build_optimizer(
            self.module, self._optimizer_config, groups=groups, strategy=f"zero{self._stage}", offload=offload
        )
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.zero = self._engine.optimizer
        if self._stage == 3 and self.target_module is not None:
            # no gradients are reduced here, and layers round weights to bf16 anyway, so nothing is lost
            autocast = {**settings["torch_autocast"], "lower_precision_safe_modules": list(LOW_PRECISION_LAYERS)}
            self._target_callable, *_ = deepspeed.initialize(
                model=self.target_module, config={**settings, "torch_autocast": autocast}, dist_init_required=False
            )
        compile_parts(self._config, *parts)

    @override
    def model(self, *args: Any) -> Tensor:
        self._before_forward()
        return self._engine(*args)  # DeepSpeed applies autocast itself

    @override
    def _evaluate(self, *args: Any) -> Tensor:
        return self._engine(*args)

    @override
    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        parts = self._config.accumulation  # stages 2 and 3 reduce gradients of each micro-batch
        for index, micro in enumerate(batch.split(parts)):
            yield micro.to(self.world.device)
            if index < parts - 1:
                self._engine.step()  # only counts the micro-batch: weights change after the last one

    @override
    def backward(self, loss: Tensor) -> None:
        self._watch.record(loss)
        self.before_waiting()
        self._engine.backward(loss)  # divides by the number of micro-batches

    @override
    def step(self, hyper: Hyper, step: int, *, by_block: bool = False) -> StepInfo:
        loss = self._watch.take()
        first = self._watch.judge.needs_norm_first
        squares = self._squares() if by_block or first else None
        judged = squares.sum() if squares is not None and first else None
        stopped = self._watch.check(step, loss, judged)  # host sync on a GPU; DeepSpeed's own step has one too
        block_norms = None
        if by_block and squares is not None:
            block_norms = self._blocks.norms(self.world.gather(squares).sum(dim=0))
        if self._watch.left_out:
            self._leave_out()
            return StepInfo(
                loss=loss,
                grad_norm=self._watch.norm,
                block_norms=block_norms,
                stopped=stopped,
                leaving=self._watch.leaving,
            )
        set_hyper(self.zero.param_groups, hyper)
        self._engine.step()
        if self.zero.overflow:  # DeepSpeed silently skips such a step on every process
            raise self._watch.refusal(step, "the gradient norm is not finite though every loss is")
        norm = self._engine.get_global_grad_norm()
        if not first:
            self._watch.judge.see_norm(step, float(norm))  # host sync on a GPU, after DeepSpeed's own
        return StepInfo(loss=loss, grad_norm=norm, block_norms=block_norms, leaving=self._watch.leaving)

    def _leave_out(self) -> None:
        """Clears the gradients by DeepSpeed's own way of skipping a step, which an infinite norm makes it take."""
        infinite = torch.tensor(torch.inf, device=self.world.device)
        name, norm = ("_get_norm_groups", [infinite]) if self._stage == 3 else ("scaled_global_norm", infinite)
        setattr(self.zero, name, lambda *_, **__: norm)
        try:
            self._engine.step()
        finally:
            delattr(self.zero, name)
        assert self.zero.overflow

    def _squares(self) -> Tensor:
        """Returns the squared norm in each block of this process's part of the reduced gradient, before `step`."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return self._blocks.squares([self._local_gradient(parameter) for parameter in trained])

    def _local_gradient(self, parameter: Any) -> Tensor | None:
        if self._stage == 3:
            return parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter).view(-1)[self._extent(parameter)]
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    @override
    def _local(self, parameter: Any) -> Tensor:
        # `ds_tensor` is this process's shard on the device; it equals the master weights, even if those are offloaded
        return parameter.ds_tensor.detach()[self._extent(parameter)] if self._stage == 3 else parameter.detach()

    def _extent(self, parameter: Any) -> slice:
        """Returns the elements of a stage-3 shard that belong to the parameter; the last shards end with padding."""
        chunk = parameter.ds_tensor.numel()
        return slice(0, max(0, min(chunk, parameter.ds_numel - self.world.rank * chunk)))

    @override
    def _target_updated(self) -> None:
        super()._target_updated()
        if self._stage == 3 and self.target_module is not None:
            # free gathered copies of the target's weights, which are stale now
            if self.world.device.type == "cuda":
                # DeepSpeed gathers on its own stream, which doesn't wait for the update on ours
                torch.cuda.current_stream().synchronize()  # host sync
            self._target_callable.optimizer.partition_all_parameters()

    @override
    def loaded(self, optimizer_step: int) -> None:
        self._kind.set_step(self.zero.optimizer, optimizer_step)
        # then renew the working copies of the weights from the master weights
        if self._stage < 3:
            self.zero.update_lp_params()
            for group in range(len(self.zero.bit16_groups)):
                self.zero._update_model_bit16_weights(group)
        else:
            self.zero._partition_all_parameters()
            for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
                self.zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
                self.zero._unflatten_partitioned_parameters(group)
        if self._replicated:
            self._replicated.loaded()
        self._target_updated()

    @override
    def pieces(self, *, working: bool = False) -> list[Piece]:
        found = super().pieces()
        if working and self._stage < 3:  # whole on each process, while the masters are in parts
            for name, parameter in self.module.named_parameters():
                found.append(super()._piece(f"working.{clean_name(name)}", parameter))
        return found

    def _masters(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups if self._stage < 3 else self.zero.fp32_partitioned_groups_flat

    @override
    def _trained_pieces(self, name: str, parameter: Any) -> Iterator[Piece]:
        if self._stage == 3:
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            shape, length = tuple(parameter.ds_shape), self._extent(parameter).stop
            start = self._start(parameter)
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is in other processes' partitions
                return
            group, shape = mapping.param_group_index, tuple(parameter.shape)
            offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        master = self._masters()[group]
        state = self._state(master)
        states = {f"optimizer.{key}": state[key] for key in self._optimizer_config.state_names}
        for kind, flat in {"model": master, **states}.items():
            part = flat.detach()[offset : offset + length]
            yield Piece(name=f"{kind}.{name}", tensor=part, start=start, shape=shape)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """Returns the optimiser state of a master weight, and creates it if missing, since loading writes to it."""
        state = self.zero.optimizer.state[master]
        if not state:
            state.update(self._kind.new_state(master))
        check_states(self._optimizer_config, state)
        return state

    def _start(self, parameter: Any) -> int:
        """Returns the first element of this process's shard of a stage-3 parameter."""
        return min(self.world.rank * parameter.ds_tensor.numel(), parameter.ds_numel)

    @override
    def _piece(self, name: str, tensor: Any) -> Piece:
        if self._stage < 3:
            return super()._piece(name, tensor)
        return Piece(
            name=name,
            tensor=self._local(tensor).view(-1),
            start=self._start(tensor),
            shape=tuple(tensor.ds_shape),
        )

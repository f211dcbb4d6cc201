"""The DeepSpeed engine: ZeRO stages 1, 2 and 3, with an exact EMA target under each.

Parameters and optimiser states are fp32 under every precision; bf16 is DeepSpeed's `torch_autocast`.
So the target's shards are fp32 too, and its update is local: stage 3 shards the target as it shards the
encoder, stages 1 and 2 replicate both. What is sent is fp32 as well, unless `zero_communication` says bf16;
the target's weights, of which no gradient is reduced, are gathered in bf16 in any case.

Uses attributes of DeepSpeed that aren't public (`grad_position`, `fp32_partitioned_groups_flat`,
`single_partition_of_fp32_groups`, `_hp_mapping`): the version is pinned and each is under test.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_scale import environment
from ijepa_scale.config import EngineConfig, OptimizerConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.attention import use_attention
from ijepa_scale.engine.ds_config import LOW_PRECISION_LAYERS, compose, load_ds_config
from ijepa_scale.engine.finite import NOTHING_MOVED, FiniteWatch
from ijepa_scale.engine.graphs import target_forward
from ijepa_scale.engine.norms import use_layer_norm
from ijepa_scale.engine.parallelize import blocks, checkpoint_blocks, compile_parts
from ijepa_scale.engine.protocol import Piece, StepInfo
from ijepa_scale.engine.target import NO_FP8, HoldsTarget
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, NonFiniteError
from ijepa_scale.optim.adamw import GroupFunction, build_optimizer, clean_name, parameter_groups, set_hyper, set_step
from ijepa_scale.schedules import Hyper

_MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """Returns the `deepspeed` module, quietened, with its run-time compilation for CPUs switched off."""
    environment.export_accelerator(device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # a shared-memory all-reduce that would be compiled for a minute; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _ask_for_input_gradients(module: nn.Module) -> None:
    """Makes the input of each trainable part behind frozen ones require a gradient.

    Stage 3 takes a part whose input needs none for done with backward before it has begun, and frees its
    weights: the first trainable block behind frozen ones would find them gone.
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


class ZeroEngine(HoldsTarget):
    """DeepSpeed ZeRO over all processes."""

    def __init__(self, world: World, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        assert config.ds_config is not None
        self.world = world
        self.triton: tuple[str, ...] = config.triton
        self._config = config
        self._optimizer_config = optimizer
        environment.export_accelerator(world.device.type)  # checking the file imports deepspeed, which picks one
        self._plan = load_ds_config(config.ds_config)
        self._watch = FiniteWatch(world)
        self._autocast = torch.autocast(
            world.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        )  # for the target, and for stages that leave it to us

    def prepare(
        self,
        module: nn.Module,
        target: nn.Module | None = None,
        *,
        groups: GroupFunction = parameter_groups,
        followed: str = "encoder",
        micro_batch: int = 1,
    ) -> None:
        """Hands the modules to DeepSpeed. `micro_batch` only reaches its throughput log."""
        deepspeed = import_deepspeed(self.world.device)
        self._stage = int(self._plan["zero_optimization"]["stage"])
        if self._stage == 3 and self._config.target_precision == "fp8":
            raise ConfigError(f"engine.target_precision is fp8 but the ZeRO stage is 3: {NO_FP8}")
        use_attention(self._config, module, target, self.world)
        use_layer_norm(self._config, self.world.device, module, target)
        checkpoint_blocks(module, self._config.checkpointing)
        module.to(self.world.device)
        if target is not None:
            target = target.to(self.world.device).requires_grad_(False).eval()
        parts = (module,) if target is None else (module, target)
        settings = compose(
            self._plan,
            micro_batch=micro_batch,
            accumulation=self._config.accumulation,
            clip_norm=self._optimizer_config.clip_norm,
            precision=self._config.precision,
            world=self.world.size,
            communication=self._config.zero_communication,
        )
        if self._stage == 3:
            # one gather per block, and the way to compile blocks under ZeRO-3
            for part in parts:
                deepspeed.utils.set_z3_leaf_modules(part, [type(block) for block in blocks(part)[:1]])
            _ask_for_input_gradients(module)
        offload = "offload_optimizer" in self._plan["zero_optimization"]
        optimizer = build_optimizer(module, self._optimizer_config, groups=groups, offload=offload)
        self._names = {id(p): clean_name(n) for n, p in module.named_parameters()}
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module: Any = module
        self._followed: Any = module.get_submodule(followed)
        self.zero = self._engine.optimizer
        self.target_module: Any = target
        self._target_callable: Any = target_forward(self._config, target, self.world.device, sharded=self._stage == 3)
        self._replicated = self._replicate(target) if target is not None and self._stage < 3 else None
        if self._stage == 3 and target is not None:
            # no gradient is reduced here, and products round the weights to bf16 anyway: so they may travel in it
            autocast = {**settings["torch_autocast"], "lower_precision_safe_modules": list(LOW_PRECISION_LAYERS)}
            self._target_callable, *_ = deepspeed.initialize(
                model=target, config={**settings, "torch_autocast": autocast}, dist_init_required=False
            )
        compile_parts(self._config, *parts)

    def model(self, *args: Any) -> Tensor:
        """Returns the trainable module's output (DeepSpeed applies autocast)."""
        return self._engine(*args)

    @torch.no_grad()
    def evaluate(self, *args: Any) -> Tensor:
        """Returns the trainable module's output in evaluation mode, without gradients."""
        training = self.module.training
        self.module.eval()
        output = self._engine(*args)
        self.module.train(training)
        return output

    @torch.no_grad()
    def target(self, *args: Any, **options: Any) -> Tensor:
        """Returns the target encoder's output, without gradients."""
        assert self.target_module is not None, "prepare() was given no target"
        with self._autocast:
            return self._target_callable(*args, **options)

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yields the micro-batches on the device; stages 2 and 3 reduce gradients on each."""
        parts = self._config.accumulation
        for index, micro in enumerate(batch.split(parts)):
            yield micro.to(self.world.device)
            if index < parts - 1:
                self._engine.step()  # counts the micro-batch; moves nothing before the last

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's mean loss; DeepSpeed divides by the accumulation."""
        self._watch.record(loss)
        self._engine.backward(loss)

    def step(self, hyper: Hyper, step: int) -> StepInfo:
        """Moves the trainable weights, or raises on every process before anything has moved."""
        loss = self._watch.take()
        self._watch.check(step, loss)  # host sync on a GPU: DeepSpeed's own step has one too
        set_hyper(self.zero.param_groups, hyper)
        self._engine.step()
        if self.zero.overflow:  # DeepSpeed skips such a step on every process, without a word
            text = f"step {step}: the gradient norm is not finite though every loss is. {NOTHING_MOVED}"
            raise NonFiniteError(text, step)
        return StepInfo(loss=loss, grad_norm=self._engine.get_global_grad_norm())

    def settle(self) -> None:
        """Does nothing: a step has raised what there was."""

    def local_shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns this process's fp32 shards of (target encoder, context encoder)."""
        if self.target_module is None:
            return [], []
        if self._replicated:
            return self._replicated.shards, [p.detach() for p in self._followed.parameters()]
        both: tuple[Any, Any] = (self.target_module.parameters(), self._followed.parameters())
        # `ds_tensor` is this process's shard on the device, equal to the master even where that is offloaded
        return tuple([p.ds_tensor.detach()[self._extent(p)] for p in parameters] for parameters in both)  # type: ignore[return-value]

    def _extent(self, parameter: Any) -> slice:
        """Returns which elements of a stage-3 shard are the parameter's; the last shards end in padding."""
        chunk = parameter.ds_tensor.numel()
        return slice(0, max(0, min(chunk, parameter.ds_numel - self.world.rank * chunk)))

    def target_updated(self) -> None:
        """Drops gathered copies of the target's weights (stage 3), which would be stale, and renews fp8 ones."""
        if self._replicated:
            self._replicated.updated()
        if self._stage == 3 and self.target_module is not None:
            if self.world.device.type == "cuda":
                # DeepSpeed gathers on a stream of its own, which doesn't wait for the update on ours
                torch.cuda.current_stream().synchronize()  # host sync
            self._target_callable.optimizer.partition_all_parameters()

    def pieces(self) -> list[Piece]:
        """Returns this process's parts of weights, optimiser states and target."""
        self._make_moments()
        frozen = [(f"model.{self._names[id(p)]}", p) for p in self.module.parameters() if not p.requires_grad]
        if self.target_module is not None:
            kept = self._replicated.values if self._replicated else dict(self.target_module.named_parameters())
            frozen += [(f"target.{clean_name(name)}", value) for name, value in kept.items()]
        return [*self._trainable_pieces(), *(self._frozen_piece(name, parameter) for name, parameter in frozen)]

    def loaded(self, optimizer_step: int) -> None:
        """Brings the working copies of the weights in line with the masters, and sets Adam's step counter."""
        set_step(self.zero.optimizer, optimizer_step)
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
        self.target_updated()

    def _masters(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups if self._stage < 3 else self.zero.fp32_partitioned_groups_flat

    def _make_moments(self) -> None:
        """Makes Adam's states where no step has been taken yet, so that loading has somewhere to write."""
        for master in self._masters():
            state = self.zero.optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(master)

    def _trainable_pieces(self) -> Iterator[Piece]:
        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                continue
            name = self._names[id(parameter)]
            if self._stage == 3:
                group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
                shape, length = tuple(parameter.ds_shape), self._extent(parameter).stop
                start = self._start(parameter)
            else:
                mapping = parameter._hp_mapping
                if mapping is None:  # lies wholly in other processes' partitions
                    continue
                group, shape = mapping.param_group_index, tuple(parameter.shape)
                offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                start = mapping.lp_fragment_address.start
            master = self._masters()[group]
            flats = {"model": master, **{f"optimizer.{k}": self.zero.optimizer.state[master][k] for k in _MOMENTS}}
            for kind, flat in flats.items():
                part = flat.detach()[offset : offset + length]
                yield Piece(name=f"{kind}.{name}", tensor=part, start=start, shape=shape)

    def _start(self, parameter: Any) -> int:
        """Returns where this process's shard of a stage-3 parameter begins."""
        return min(self.world.rank * parameter.ds_tensor.numel(), parameter.ds_numel)

    def _frozen_piece(self, name: str, parameter: Any) -> Piece:
        """Returns this process's part of a parameter that has no optimiser state: a target's, or a frozen block's."""
        sharded = self._stage == 3
        shard = parameter.ds_tensor[self._extent(parameter)] if sharded else parameter
        return Piece(
            name=name,
            tensor=shard.detach().view(-1),
            start=self._start(parameter) if sharded else 0,
            shape=tuple(parameter.ds_shape if sharded else parameter.shape),
            write=sharded or self.world.is_main,
        )

"""AdamW and its parameter groups. Modules and tensors, no process."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ijepa_scale.config import AdamWConfig, OptimizerConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.schedules import Hyper

CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."
COMPILE_PREFIX = "_orig_mod."

# From a module, whole or sharded, to its groups: each a dict of `params`, `decay` (bool) and perhaps `lr_scale`.
GroupFunction = Callable[[nn.Module], list[dict[str, Any]]]
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_PATCHES = re.compile(r"(?:^|\.)(?:patch_embed\.|pos_embed$)")


def clean_name(name: str) -> str:
    """Returns a parameter's name without what checkpointing and compilation put into it."""
    return name.replace(CHECKPOINT_PREFIX, "").replace(COMPILE_PREFIX, "")


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the four published groups: encoder and predictor weights, then their biases and 1-D parameters.

    Weights decay, biases and 1-D parameters don't; `mask_token` is 3-D and decays. Groups without
    parameters are left out. Each group carries `decay` (bool), which `set_hyper` reads.

    Source: the I-JEPA paper's released code, as stated in the project's specification.
    """
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        for part in ("encoder", "predictor"):
            named = [
                (name, p)
                for name, p in ((clean_name(n), p) for n, p in module.named_parameters())
                if p.requires_grad
                and name.startswith(f"{part}.")
                and (p.ndim > 1 and not name.endswith(".bias")) == decay
            ]
            if named:
                groups.append(
                    {"params": [p for _, p in named], "decay": decay, "name": f"{part}{'' if decay else ' 1-D'}"}
                )
    return groups


def layer_decay_groups(module: nn.Module, *, layer_decay: float) -> list[dict[str, Any]]:
    """Returns a classifier's groups, whose learning rates fall from the head to the patches, patches first.

    A group's `lr_scale` is layer_decay^(depth + 1 - id), with id 0 for patch and position embedding, i + 1
    for block i, and depth + 1 for the rest: norms outside blocks and the head. `decay` is false for 1-D
    parameters and position embeddings. Frozen parameters are in no group, but frozen blocks count.

    Raises:
        ValueError: `layer_decay` is outside (0, 1], or the module has no blocks.

    Source: arXiv 2111.06377, appendix A.1, with its released code; the rule is from arXiv 2003.10555.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; give a number above 0 and at most 1")
    named = [(clean_name(name), parameter) for name, parameter in module.named_parameters()]
    depth = max((int(found[1]) + 1 for name, _ in named if (found := _BLOCK.search(name))), default=0)
    if not depth:
        raise ValueError(f"{type(module).__name__} has no parameters blocks.N to decay over; give an encoder's module")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        block = _BLOCK.search(name)
        layer = int(block[1]) + 1 if block else 0 if _PATCHES.search(name) else depth + 1
        decay = parameter.ndim > 1 and not name.endswith("pos_embed")
        empty = {"params": [], "decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        group = groups.setdefault((layer, decay), {**empty, "name": f"layer {layer}{'' if decay else ' 1-D'}"})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def set_hyper(groups: Iterable[dict[str, Any]], hyper: Hyper) -> None:
    """Sets learning rate (times `lr_scale` where a group has one) and weight decay (where it decays) of the groups."""
    for group in groups:
        group["lr"] = hyper.lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = hyper.weight_decay if group["decay"] else 0.0


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets Adam's step counter, wherever the implementation keeps it: by parameter (torch), or by group (apex)."""
    for state in optimizer.state.values():
        counter = state.get("step")
        state["step"] = counter.fill_(step) if isinstance(counter, torch.Tensor) else step
    for group in optimizer.param_groups:
        if "step" in group or not isinstance(optimizer, torch.optim.AdamW):
            group["step"] = step


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, groups: GroupFunction = parameter_groups, offload: bool = False
) -> torch.optim.Optimizer:
    """Returns AdamW over the module's groups; `auto` is PyTorch's fused kernel.

    Args:
        module: the trainable module, on its device.
        config: the optimizer section.
        groups: what cuts the module's parameters into groups.
        offload: the states live in host memory (DeepSpeed CPU offload).

    Raises:
        ConfigError: the chosen implementation isn't installed, or isn't NVIDIA's.
    """
    assert isinstance(config, AdamWConfig), f"no AdamW in {config}"
    parts = groups(module)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
    if config.impl in ("auto", "torch"):
        return torch.optim.AdamW(parts, fused=True, **settings)
    if config.impl == "apex":
        return _apex_adam()(parts, adam_w_mode=True, **settings)
    try:
        adam = importlib.import_module("deepspeed.ops.adam")
    except ImportError as error:
        raise ConfigError(f"optimizer.impl is deepspeed, which can't be imported ({error}); set it to torch") from error
    if offload:
        return adam.DeepSpeedCPUAdam(parts, adamw_mode=True, **settings)
    return adam.FusedAdam(parts, adam_w_mode=True, **settings)


def _apex_adam() -> Any:
    """Returns apex's FusedAdam, having made sure that apex is NVIDIA's: the PyPI name is another project."""
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")
        return optimizers.FusedAdam
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer.impl is apex but NVIDIA's apex with its CUDA extensions isn't installed ({error}); build "
            "it from github.com/NVIDIA/apex (the PyPI package of that name is another project), or set "
            "optimizer.impl=torch"
        ) from error

"""Applies activation checkpointing and compilation to a model, from outside the model, and decides on compilation.

The order is checkpointing, compilation, then the engine's sharding. Each works block by block.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ijepa_kernels.linear import onednn
from ijepa_scale import environment
from ijepa_scale.config import EngineConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.vit import Block
from ijepa_scale.planning.strategy import resolve_compile

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 16
_LEAST_CAPABILITY = (7, 0)  # of NVIDIA GPUs. Source: `create_backend` of `torch/_inductor/scheduler.py`

# Selective checkpointing keeps the results of these expensive operations. It recomputes norms, GELU and additions.
_KEPT_OPERATIONS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.ijepa_kernels.attention_by_runs.default,
]


def block_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yields the lists of transformer blocks, with or without wrappers, in the order of the module tree."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) and isinstance(child[0], (Block, CheckpointWrapper)):
            yield child


def blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the transformer blocks, in their checkpointing wrappers if they have them."""
    return [block for children in block_lists(module) for block in children]


def checkpoint_blocks(module: nn.Module, mode: str) -> None:
    """Makes each block recompute activations in backward: all of them (full) or only the cheap ones (selective)."""
    if mode == "none":
        return
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _kept_operations())
    for children in block_lists(module):
        for index, block in enumerate(children):
            children[index] = checkpoint_wrapper(block, **options)


def _kept_operations() -> list[torch._ops.OpOverload]:
    # a PyTorch without oneDNN has no such operation, and importing this module must not fail there
    return _KEPT_OPERATIONS + ([torch.ops.mkldnn._linear_pointwise.default] if onednn.is_available() else [])


def choose_compile(config: EngineConfig, device: torch.device) -> EngineConfig:
    """Returns the configuration with `compile: auto` replaced, and logs the choice with its reason.

    Raises:
        ConfigError: `compile` is true and this machine can't compile for the device, or the target is fp8 on a GPU
            and its blocks aren't compiled.
    """
    problem = compile_problem(device)
    if config.compile is True and problem is not None:
        raise ConfigError(f"engine.compile is true but {problem}, or set engine.compile=false")
    chosen, reason = resolve_compile(config, device=device.type, problem=problem)
    if device.type == "cuda" and chosen.target_precision == "fp8" and not chosen.compile:
        # on the CPU the tests run it: products in fp8 are slow there in any case
        raise ConfigError(
            f"engine.target_precision is fp8 but engine.compile is {str(config.compile).lower()} ({reason}): without "
            "compilation, quantising reads each input twice, which costs more than fp8 products gain; set "
            "engine.compile=auto, or engine.target_precision=null"
        )
    if config.compile == "auto":
        logger.info("engine.compile is %s: %s", str(chosen.compile).lower(), reason)
    return chosen


def compile_problem(device: torch.device) -> str | None:
    """Returns why torch.compile can't work for this device, with a remedy; None if nothing is known to be missing.

    On GPUs it writes Triton kernels, and Triton builds the code that launches them with a C compiler. Compiles nothing.
    """
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return (
            f"torch.compile needs a GPU of compute capability {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use a newer GPU"
        )
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which isn't installed; install the triton that this PyTorch names"
    if environment.c_compiler() is None:
        return "Triton needs a C compiler and finds none; install gcc, or set CC"
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers and {header} doesn't exist; install python3-dev, or Python with headers"
    return None


def compile_parts(config: EngineConfig, *parts: nn.Module | None) -> None:
    """Compiles the blocks of each part if the config says so, with the config's cache folder.

    Graph breaks and too many graphs raise errors; torch.compile never falls back to eager mode.
    """
    assert config.compile != "auto", "choose_compile comes first"
    if not config.compile:
        return
    folder = environment.export_compile_cache(config.compile_cache)
    set_compile_limits()
    for part in parts:
        if part is not None:
            compile_blocks(part)
    logger.info("blocks are compiled at their first use; the cache is %s", folder)


def set_compile_limits() -> None:
    """Sets the limits and options of torch.compile in this process."""
    import torch._dynamo  # imported here because it takes a second

    settings = torch._dynamo.config
    # All blocks of all networks share one code object, and so one limit: target, context and predictor need 2 graphs
    # each, and more for frozen blocks, evaluation and batches of one image. Beyond the limit it raises an error.
    settings.recompile_limit = RECOMPILE_LIMIT
    settings.fail_on_recompile_limit_hit = True
    settings.specialize_float = True  # otherwise epsilons become graph inputs, and each graph is traced twice
    # under DDP it would split large blocks into one graph per bucket; blocks are small enough to overlap without that
    settings.optimize_ddp = False


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles each block's forward as one graph, for any number of tokens.

    It compiles `forward`, not the module call, so that hooks of FSDP2 and ZeRO-3 stay outside the graph.
    """
    for block in blocks(module):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)

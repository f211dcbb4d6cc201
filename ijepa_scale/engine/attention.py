"""Gives each network the attention kernel that the config names or auto finds, after a test with its shapes.

Must not know how weights are sharded or trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ijepa_kernels.attention.backend import (
    HeadShape,
    activate,
    backend_for,
    choose_backend,
    packed_backend,
    packed_problem,
)
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.layers import Attention
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer

logger = logging.getLogger(__name__)

_REMEDY = "set engine.attention=auto or another kernel; on CUDA only math and efficient run with engine.precision=fp32"


def use_attention(config: EngineConfig, module: nn.Module, target: nn.Module | None, world: World) -> dict[str, str]:
    """Gives each network its kernel for dense attention, `config.attention` or the first of auto's order, and logs it.

    Returns the kernels by role: target, context, predictor. Runs each network's shapes on the device, which
    synchronises.

    Raises:
        ConfigError: the kernel can't run on this device, or can't run these shapes in this precision.
    """
    dtype, device = _dtype(config), world.device
    names: dict[str, str] = {}
    try:
        activate(config.attention, device)
        for network, shape in _networks(module, target):
            kernel = choose_backend(config.attention, list(_tried(shape)), dtype, device)
            for part in network.modules():
                if isinstance(part, Attention):
                    part.kernel = kernel
            names[shape.role] = backend_for(shape, dtype, device, kernel)
            if device.type == "cuda" and kernel == "math" and world.is_main:
                logger.warning(
                    "attention of %s stores all scores: engine.attention is math, or no fused kernel runs here", shape
                )
    except ValueError as error:
        raise ConfigError(f"engine.{error}; {_REMEDY}") from error
    if world.is_main:
        logger.info("%s: %s", config.attention, _by_kernel(names))
    return names


def _by_kernel(names: dict[str, str]) -> str:
    """Returns the roles of each kernel as text that, with the logger's name, fits a line of 100 characters."""
    roles = {kernel: [role for role, own in names.items() if own == kernel] for kernel in names.values()}
    return ", ".join(f"{kernel} ({', '.join(each)})" for kernel, each in roles.items())


def require_packed(config: EngineConfig, module: nn.Module, world: World) -> None:
    """Checks that these networks can run packed sequences on this device. Call after `use_attention`.

    Raises:
        ConfigError: they can't.
    """
    for network, shape in _networks(module, None):
        kernel = next(part.kernel for part in network.modules() if isinstance(part, Attention))
        for tried in (shape, _some_queries(shape)):
            problem = packed_problem(tried, _dtype(config), world.device, kernel)
            if problem is not None:
                raise ConfigError(
                    f"engine.attention is {config.attention} and masks.context is packed, but {problem}; "
                    "set masks.context=truncate, or engine.attention=auto"
                )
    if world.is_main:
        logger.info("packed sequences: %s", packed_backend(_dtype(config), world.device))


def head_shapes(module: nn.Module, target: nn.Module | None) -> Iterator[HeadShape]:
    """Yields the attention shape of each network, with one token for each patch of an image."""
    return (shape for _, shape in _networks(module, target))


def _networks(module: nn.Module, target: nn.Module | None) -> Iterator[tuple[nn.Module, HeadShape]]:
    """Yields target, context encoder and predictor, those there are, with their shapes."""
    first: Any  # a block, possibly in a checkpointing wrapper
    for part, role, trained in ((target, "target", False), (module, "context", True)):
        for child in () if part is None else part.modules():
            if isinstance(child, VisionTransformer):
                first, width = child.blocks[0], child.width
            elif isinstance(child, Predictor):
                role, first, width = "predictor", child.predictor_blocks[0], child.width
            else:
                continue
            heads = int(first.attn.heads)
            tokens = child.grid[0] * child.grid[1]
            yield (
                child,
                HeadShape(
                    role=role, heads=heads, head_dim=width // heads, queries=tokens, tokens=tokens, trained=trained
                ),
            )


def _tried(shape: HeadShape) -> Iterator[HeadShape]:
    """Yields the shapes that a kernel must run: all tokens, the last block's, and the odd numbers that masks leave."""
    yield shape
    yield _some_queries(shape)
    if shape.trained and shape.tokens > 2:
        odd = (shape.tokens - 1) // 2 * 2 - 1
        yield _some_queries(dataclasses.replace(shape, tokens=odd))
        yield dataclasses.replace(shape, queries=odd, tokens=odd)


def _some_queries(shape: HeadShape) -> HeadShape:
    """Returns the shape in a last block, which computes only some of the tokens."""
    return dataclasses.replace(shape, queries=max(1, shape.tokens // 2))


def _dtype(config: EngineConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32

"""Selects the attention kernel that the config names, tests it with the run's shapes and logs it.

Must not know how weights are sharded or trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ijepa_kernels.attention.backend import HeadShape, backend_for, choose_backend, packed_backend, packed_problem
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer

logger = logging.getLogger(__name__)

_REMEDY = "set engine.attention=auto or another kernel; on CUDA only math and efficient run with engine.precision=fp32"


def use_attention(config: EngineConfig, module: nn.Module, target: nn.Module | None, world: World) -> None:
    """Sets the kernel for dense attention in this process to `config.attention`, and logs the kernel of each network.

    Runs each head shape once on the device, which synchronises.

    Raises:
        ConfigError: the kernel can't run on this device, or can't run these shapes in this precision.
    """
    dtype, device = _dtype(config), world.device
    shapes = list(head_shapes(module, target))
    tried = [each for shape in shapes for each in (shape, _some_queries(shape))]
    try:
        chosen = choose_backend(config.attention, tried, dtype, device)
    except ValueError as error:
        raise ConfigError(f"engine.{error}; {_REMEDY}") from error
    if world.is_main:
        each = ", ".join(f"{backend_for(shape, dtype, device)} for {shape}" for shape in shapes)
        logger.info(
            "engine.attention %s is %s on %s: %s; packed sequences: %s",
            config.attention, chosen, device, each, packed_backend(dtype, device),
        )  # fmt: skip
        if device.type == "cuda" and chosen == "math":
            logger.warning("attention stores all scores: engine.attention is math, or no fused kernel runs here")


def require_packed(config: EngineConfig, module: nn.Module, world: World) -> None:
    """Checks that these networks can run packed sequences on this device. Call after `use_attention`.

    Raises:
        ConfigError: they can't.
    """
    for shape in head_shapes(module, None):
        problem = packed_problem(shape, _dtype(config), world.device)
        if problem is not None:
            raise ConfigError(
                f"engine.attention is {config.attention} and masks.context is packed, but {problem}; "
                "set masks.context=truncate, or engine.attention=auto"
            )


def head_shapes(module: nn.Module, target: nn.Module | None) -> Iterator[HeadShape]:
    """Yields the attention shape of each network, with one token for each patch of an image."""
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
            yield HeadShape(
                role=role, heads=heads, head_dim=width // heads, queries=tokens, tokens=tokens, trained=trained
            )


def _some_queries(shape: HeadShape) -> HeadShape:
    """Returns the shape in a last block, which computes only some of the tokens."""
    return dataclasses.replace(shape, queries=max(1, shape.tokens // 2))


def _dtype(config: EngineConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32

"""Runs the target's forward as a CUDA graph, which replaces hundreds of kernel launches by one.

A graph replays fixed addresses. Weights and their bf16 or fp8 copies are updated in place, so a replay reads the new
values. Weights that are gathered for each forward (FSDP2, ZeRO-3) have a new address each time, so graphs are refused
for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ijepa_scale.config import EngineConfig
from ijepa_scale.config.schema import NO_GRAPH
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.vit import VisionTransformer

logger = logging.getLogger(__name__)

_WARM_UPS = 3  # forwards before the capture, to finish compilation, cuBLAS workspaces and allocations


def target_forward(
    config: EngineConfig, target: nn.Module | None, device: torch.device, *, sharded: bool = False
) -> Callable[..., Tensor]:
    """Returns the callable that computes the target's output: the target itself, or its graph if the config says so.

    `sharded` says that weights are gathered for each forward; modules of FSDP2 are detected without it.

    Raises:
        ConfigError: the config enables graphs, but the device is the CPU, weights are sharded, or the target isn't an
            encoder.
    """
    if not config.cuda_graphs:
        return _no_target if target is None else target
    if sharded or any(isinstance(module, FSDPModule) for module in (() if target is None else target.modules())):
        raise ConfigError(f"engine.cuda_graphs is true but the target's weights are sharded: {NO_GRAPH}")
    if device.type != "cuda":
        raise ConfigError(f"engine.cuda_graphs is true but this run is on {device}; set engine.cuda_graphs=false")
    if not isinstance(target, VisionTransformer):
        raise ConfigError(
            "engine.cuda_graphs is true but only pretraining has a target in its steps; set engine.cuda_graphs=false"
        )
    return GraphedTarget(target)


class _Graph(NamedTuple):
    images: Tensor  # (B, 3, H, W), the input of a replay
    tokens: Tensor  # (B, N, D) fp32, its output
    replay: Callable[[], None]


class GraphedTarget:
    """A target encoder whose trunk is replayed from a graph in training steps.

    The last block isn't part of the graph, since its number of tokens varies. Calls without `wanted` (evaluations, with
    other batch sizes) run the encoder itself. The first call with `wanted`, and each call with a new image shape,
    captures a graph: it synchronises and takes the time of several forwards.
    """

    def __init__(self, encoder: VisionTransformer) -> None:
        self._encoder = encoder
        self._graph: _Graph | None = None

    def __call__(self, images: Tensor, *args: Tensor, wanted: Tensor | None = None, **options: object) -> Tensor:
        """Returns the encoder's output for the same arguments, without gradients."""
        if wanted is None or args or options:
            return self._encoder(images, *args, wanted=wanted, **options)
        graph = self._graph
        if graph is None or graph.images.shape != images.shape or graph.images.dtype != images.dtype:
            # free the old graph and its pool before capturing; if the capture fails, no graph is left
            self._graph = graph = None
            own = images.clone()
            self._graph = graph = _Graph(own, *self._capture(own))
            logger.info("captured the target's forward of images %s as a CUDA graph", tuple(images.shape))
        graph.images.copy_(images)
        graph.replay()
        return self._encoder.head(graph.tokens, wanted=wanted)

    def _capture(self, images: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Returns the tokens of `images`, and a function that computes them again from and into the same memory."""
        # Without this, autocast would cache casts until it ends, and later replays would read freed memory. Compiled
        # blocks are traced once more, since their graphs have a guard on this setting of autocast.
        autocast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.no_grad(), autocast:
            stream = torch.cuda.Stream(images.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._encoder.trunk(images)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local, since a global capture forbids other threads to pin masks and images
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                tokens = self._encoder.trunk(images)
        return tokens, graph.replay


def _no_target(*args: object, **options: object) -> Tensor:
    raise AssertionError("prepare() was given no target")

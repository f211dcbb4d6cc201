"""The target's forward as a CUDA graph: its hundreds of launches become one.

A graph replays fixed addresses. Weights and their roundings are updated in place, so a replay sees the new ones;
weights that are gathered for each forward (FSDP2, ZeRO-3) lie elsewhere each time, so there it is refused.
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

_WARM_UPS = 3  # forwards before the capture: compilation, cuBLAS workspaces and the allocator must have settled


def target_forward(
    config: EngineConfig, target: nn.Module | None, device: torch.device, *, sharded: bool = False
) -> Callable[..., Tensor]:
    """Returns what an engine calls for the target's output: the target itself, or its graph where the config asks.

    `sharded`: weights are gathered for each forward; of FSDP2's modules it is seen here.

    Raises:
        ConfigError: a graph is asked for on the CPU, of sharded weights, or of no encoder.
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
    images: Tensor  # where a replay reads, (B, 3, H, W)
    tokens: Tensor  # where it writes, (B, N, D) fp32
    replay: Callable[[], None]


class GraphedTarget:
    """A target encoder whose trunk is replayed in training steps; the last block, whose tokens vary, is called.

    Calls without `wanted` (evaluations, with batches of other sizes) go to the encoder itself. The first call with
    `wanted`, and one with images of another shape, captures: it synchronises and takes the time of some forwards.
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
            # the old graph and its pool go before the new ones come, and a capture that fails leaves none
            self._graph = graph = None
            own = images.clone()
            self._graph = graph = _Graph(own, *self._capture(own))
            logger.info("the target's forward of images %s is captured as a CUDA graph", tuple(images.shape))
        graph.images.copy_(images)
        graph.replay()
        return self._encoder.head(graph.tokens, wanted=wanted)

    def _capture(self, images: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Returns where the tokens of `images` are written, and what writes them anew from the same memory."""
        # casts that autocast keeps until its end would be read from freed memory by a later replay. Compiled blocks
        # are traced once more for it: whether autocast keeps casts is a guard of their graphs
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
            # thread_local: other threads pin masks and images meanwhile, which a global capture forbids
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                tokens = self._encoder.trunk(images)
        return tokens, graph.replay


def _no_target(*args: object, **options: object) -> Tensor:
    raise AssertionError("prepare() was given no target")

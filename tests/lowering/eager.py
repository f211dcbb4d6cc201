"""Counts the bytes that eager operations read and write, each tensor once per operation, without computing anything."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale.config import BlockMaskConfig, RegressionConfig
from ijepa_scale.engine.target import ReplicatedTarget
from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.types import Wanted
from ijepa_scale.models.layers import Block
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from tests.lowering.roles import IMAGES, MASKS, MODEL, place

WIDTH = 1280  # of MODEL
# Products and attention are counted as FLOPs; the others move nothing.
_APART = ("mm", "flash_attention", "empty", "detach", "device", "promote_types", "_unsafe_view")


class Counter(TorchDispatchMode):
    """Sums the bytes of the inputs and outputs of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not any(apart in function.overloadpacket.__name__ for apart in _APART):
            tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def block(tokens: int) -> tuple[float, float]:
    """Returns the bytes of an eager block's forward and backward in bf16, with the casts of its weights."""
    with FakeTensorMode():
        module = Block(WIDTH, 16, 4 * WIDTH)
        with torch.autocast("cpu", dtype=torch.bfloat16), Counter() as forward:
            out = module(torch.empty(1, tokens, WIDTH, requires_grad=True))
        with Counter() as backward:
            out.backward(torch.empty(out.shape))
    return forward.bytes, backward.bytes


def outside(masks: str) -> float:
    """Returns the bytes of a step outside all blocks: embeddings, gathers, final norms, objective, both passes."""
    drawn = MaskSampler(BlockMaskConfig(**MASKS[masks]), MODEL.grid, seed=5)(0, 0, IMAGES, IMAGES)
    wanted = Wanted.of(drawn, IMAGES, MODEL.grid[0] * MODEL.grid[1])
    jepa = build_jepa(MODEL, seed=0, device="meta")
    target, objective = build_target(jepa), build_objective(RegressionConfig())
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(Block, "forward", _pass):
        place(jepa, "cpu")
        place(target, "cpu")
        ReplicatedTarget(target, precision="bf16")
        images = torch.empty(IMAGES, 3, *MODEL.image_size)
        with Counter() as counter:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    tokens = target(images, wanted=wanted.patches)
                prediction = jepa(images, drawn)
            objective(prediction, tokens, drawn, wanted).backward()
    return counter.bytes


def _pass(self: Block, x: Tensor, *args: Any, queries: Tensor | None = None, **options: Any) -> Tensor:
    return x if queries is None else queries


def counted() -> dict[str, float]:
    """Returns bytes per token and channel, per parameter, and outside blocks per patch and channel of whole images."""
    (few, few_back), (many, many_back) = block(4096), block(8192)
    forward, backward = (many - few) / (4096 * WIDTH), (many_back - few_back) / (4096 * WIDTH)
    weights = sum(x.numel() for x in Block(WIDTH, 16, 4 * WIDTH).parameters())
    patches = IMAGES * MODEL.grid[0] * MODEL.grid[1] * WIDTH
    return {
        "forward": forward,
        "backward": backward,
        "weights forward": (few - forward * 4096 * WIDTH) / weights,
        "weights backward": (few_back - backward * 4096 * WIDTH) / weights,
        "outside dense": outside("dense") / patches,
        "outside packed": outside("packed") / patches,
    }

"""Traces the real networks, at ViT-H's widths, on a pretended GPU, and keeps the graphs of their compiled blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from ijepa_scale.config import BlockMaskConfig, ModelConfig
from ijepa_scale.engine.low_copies import use_low_copies
from ijepa_scale.engine.parallelize import checkpoint_blocks, compile_blocks, set_compile_limits
from ijepa_scale.engine.target import ReplicatedTarget
from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.types import Wanted
from ijepa_scale.models.registry import build_jepa, build_target
from tests.lowering.pretend import Gpu, fake_mode

# ViT-H/14 at 224 and its predictor, with few blocks: they are all alike except the last.
MODEL = ModelConfig(name="vit_huge", image_size=224, patch_size=14, depth=3, predictor_depth=3)
IMAGES = 128
MASKS = {"dense": {"context": "truncate"}, "packed": {"context": "packed"}}


@dataclass
class Graph:
    """What torch.compile traced for the blocks of a role: once for most blocks, once for those with `queries`."""

    role: str
    module: torch.fx.GraphModule
    inputs: list[Any]  # as the graph takes them: symbolic sizes, tokens of symbolic shapes, parameters


@dataclass
class Traced:
    """The graphs of some steps, and the different numbers of tokens per image in them."""

    graphs: list[Graph] = field(default_factory=list)
    lengths: set[Any] = field(default_factory=set)
    role: str = ""

    def compiler(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Keeps a graph; the backend of torch.compile."""
        examples = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        self.graphs.append(Graph(self.role, graph, examples))
        return graph.forward

    def counts(self) -> dict[str, int]:
        """Returns the number of graphs of each role."""
        roles = [graph.role for graph in self.graphs]
        return {role: roles.count(role) for role in dict.fromkeys(roles)}


def trace(
    gpu: Gpu,
    masks: str,
    *,
    precision: str = "bf16",
    copies: bool = False,
    checkpointing: str = "none",
    steps: int = 5,
) -> Traced:
    """Runs the forward of target, context and predictor for the masks of some steps, without computing anything.

    Args:
        masks: dense or packed.
        precision: the target's, bf16 or fp8.
        copies: whether context and predictor compute with bf16 copies of their weights, as with the fused tail.
        checkpointing: none, selective or full.
        steps: number of batches; their masks, and so their lengths, differ.
    """
    torch._dynamo.reset()
    set_compile_limits()
    found = Traced()
    sampler = MaskSampler(BlockMaskConfig(**MASKS[masks]), MODEL.grid, seed=5)
    drawn = [sampler(step, 0, IMAGES, IMAGES) for step in range(steps)]
    wanted = [Wanted.of(each, IMAGES, MODEL.grid[0] * MODEL.grid[1]).patches for each in drawn]
    jepa = build_jepa(MODEL, seed=0, device="meta")
    target = build_target(jepa)
    with fake_mode():
        for part in (jepa, target):
            place(part, "cuda")
        ReplicatedTarget(target, precision=precision)
        if copies:
            use_low_copies(jepa)
        checkpoint_blocks(jepa, checkpointing)
        for part in (jepa, target):
            compile_blocks(part, backend=found.compiler)  # type: ignore[arg-type]
        images = torch.empty(IMAGES, 3, *MODEL.image_size, device="cuda")
        for part, role in ((jepa.encoder, "context"), (jepa.predictor, "predictor"), (target, "target")):
            part.register_forward_pre_hook(lambda *_, role=role: setattr(found, "role", role))
        for each, patches in zip(drawn, wanted, strict=True):
            found.lengths.add(each.mean_tokens())
            with gpu.autocast():
                with torch.no_grad():
                    target(images, wanted=_on_gpu(patches))
                jepa(images, each.map(_on_gpu))
    return found


def _on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def place(module: nn.Module, device: str) -> None:
    """Gives a module of a fake mode parameters and buffers on a device; `Module.to` can't."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else torch.empty(value.shape, device=device)

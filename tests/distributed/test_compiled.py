"""Compiled blocks need at most 2 graphs per role for any lengths, under every engine and checkpointing mode."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine import parallelize
from ijepa_scale.engine.world import World
from tests.distributed.harness import run
from tests.distributed.training import BATCH, MODEL, make, masks_config, part

ENGINES = {
    "plain": (1, {"strategy": "plain"}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "zero3": (2, {"strategy": "deepspeed", "ds_config": "ds_configs/zero3_small.json"}),
}
MASKS = {
    "dense": {"context": "truncate"},  # one length for the whole batch
    "ragged": {"context": "truncate", "group_size": BATCH // 4},  # one length for each group, so packed
    "packed": {"context": "packed"},
}
STEPS = 5
# Covers every engine, checkpointing mode and kind of masks; all combinations would take minutes.
CASES = {
    "plain": [("none", "ragged"), ("selective", "packed")],
    "ddp": [("full", "dense")],
    "fsdp2": [("none", "packed"), ("selective", "dense")],
    "zero3": [("full", "dense"), ("selective", "packed")],
}


class CountingBackend:
    """Runs graphs without compiling them, and counts the graphs of each role."""

    def __init__(self) -> None:
        self.graphs: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        widths = {x.shape[-1] for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim}
        role = "predictor" if MODEL.predictor_width in widths else "context"
        self.graphs[role if torch.is_grad_enabled() else "target"] += 1
        return graph


def count_graphs(world: World, engine: dict, cases: list[tuple[str, str]]) -> list[tuple[dict, int]]:
    """Returns, for each (checkpointing, masks), the graphs of each role and the number of different lengths."""
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000  # for DDP, so that blocks are larger than a bucket
    compiled = parallelize.compile_blocks
    results = []
    for checkpointing, masks in cases:
        torch._dynamo.reset()
        backend = CountingBackend()
        parallelize.compile_blocks = functools.partial(compiled, backend=backend)  # type: ignore[assignment, arg-type]
        settings = EngineConfig(**engine, precision="fp32", compile=True, checkpointing=checkpointing)
        settings = settings.replace(attention="flash")  # named in the graph, as each network's kernel is on a GPU
        _, step = make(world, settings, AdamWConfig(), masks_config(**MASKS[masks]))
        lengths = set()
        for index in range(STEPS):
            batch = part(index, world)
            drawn, _ = step.masks(index, batch.position, len(batch), BATCH)
            lengths.add(drawn.mean_tokens())
            step(batch)
        results.append((dict(backend.graphs), len(lengths)))
    return results


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n == "zero3" else n for n in ENGINES])
def test_two_graphs_per_role_whatever_the_lengths(name: str) -> None:
    """Target and predictor need one graph for most blocks and one for the last, which computes only some tokens."""
    processes, engine = ENGINES[name]
    for results in run(count_graphs, processes, engine, CASES[name], alone=name == "plain"):
        for (graphs, num_lengths), case in zip(results, CASES[name], strict=True):
            assert num_lengths >= 4, case
            assert graphs == {"target": 2, "context": 1, "predictor": 2}, case

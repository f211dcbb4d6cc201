"""Compiled blocks: the limit of graphs, finetuning's graphs, and a cache that a second process reads."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit

from ijepa_scale import environment
from ijepa_scale.config import EncoderConfig
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.engine.parallelize import RECOMPILE_LIMIT, checkpoint_blocks, compile_blocks, set_compile_limits
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.models.layers import Block


@pytest.fixture(autouse=True)
def own_limits():
    """Restores the limits, which are global to the process."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def test_too_many_graphs_raise_an_error():
    set_compile_limits()
    block = Block(8, 2, 16)
    compile_blocks(torch.nn.Sequential(torch.nn.ModuleList([block])), backend="eager")
    with torch.no_grad(), pytest.raises(FailOnRecompileLimitHit):
        for number in range(RECOMPILE_LIMIT + 1):  # forces a new graph: each has a guard on the number of threads
            torch.set_num_threads(1 + number)
            block(torch.zeros(2, 3, 8))
    torch.set_num_threads(1)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_finetuning_with_drop_path_and_frozen_blocks_stays_below_the_limit(checkpointing):
    """Covers frozen blocks, the first trainable one, the others, and evaluation with any batch size and an average."""
    graphs: Counter[str] = Counter()

    def backend(graph, inputs):
        graphs["training" if torch.is_grad_enabled() else "evaluation"] += 1
        return graph

    set_compile_limits()
    config = ClassifierConfig(
        encoder=EncoderConfig(name="vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=6, heads=2),
        num_classes=3,
        drop_path=0.2,
        frozen_blocks=2,
    )
    classifier, average = build_classifier(config), build_classifier(config).requires_grad_(False).eval()
    checkpoint_blocks(classifier, checkpointing)
    for part in (classifier, average):
        compile_blocks(part, backend=backend)
    for count in (5, 4, 3, 2, 1):
        images = torch.zeros(count, 3, 32, 32)
        classifier.train()
        classifier(images, torch.ones(count, 6, 2)).sum().backward()
        classifier.eval()
        with torch.no_grad():
            classifier(images)
            average(images)
        if count == 2:
            assert graphs["training"] <= 3 and graphs["evaluation"] <= 3
    assert sum(graphs.values()) < RECOMPILE_LIMIT  # a batch of one image has graphs of its own


COMPILE = """
import sys, torch, torch._inductor.config
torch._inductor.config.cpp.vec_isa_ok = False  # otherwise each test of the processor's features compiles a program
from torch._dynamo.utils import counters
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.parallelize import compile_parts
from ijepa_scale.models.layers import Block
blocks = torch.nn.Sequential(torch.nn.ModuleList([Block(8, 2, 16)]))
blocks[0][0].attn.kernel = "flash"  # as the engine sets it on a GPU
compile_parts(EngineConfig(compile=True, compile_cache=sys.argv[1]), blocks)
with torch.no_grad():
    blocks[0][0](torch.zeros(2, 3, 8))
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.long
def test_a_second_process_reads_the_cache_of_the_first(tmp_path):
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(tmp_path)],
            capture_output=True, text=True, env=environment.child_environment(OMP_NUM_THREADS="1"), check=True,
        )  # fmt: skip
        counts.append(tuple(map(int, done.stdout.split())))
    (misses, hits), (later_misses, later_hits) = counts
    assert misses > 0 and hits == 0
    assert later_misses == 0 and later_hits > 0

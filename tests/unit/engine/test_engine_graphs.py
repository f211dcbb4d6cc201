"""The graphed target: its trunk and head, its replays and its refusals. tests/gpu runs it on CUDA."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from ijepa_scale.config import EngineConfig
from ijepa_scale.engine.graphs import GraphedTarget, target_forward
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.registry import build_encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GRAPHS = EngineConfig(cuda_graphs=True)


class ReplayedOnCpu(GraphedTarget):
    """Replaces the graph: a replay computes from and into the same memory."""

    captures = replays = 0

    def _capture(self, images):
        self.captures += 1
        tokens = self._encoder.trunk(images).clone()

        def replay():
            self.replays += 1
            tokens.copy_(self._encoder.trunk(images))

        return tokens, replay


@pytest.fixture
def encoder():
    return build_encoder("vit_tiny", image_size=32, patch_size=8, depth=3, width=24, heads=2, seed=1).requires_grad_(
        False
    )


def images_of(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_trunk_and_head_are_the_forward_bit_for_bit(encoder):
    images, wanted = images_of(2), torch.tensor([[0, 5, 7], [3, 2, 15]])
    assert torch.equal(encoder.head(encoder.trunk(images)), encoder(images))
    assert torch.equal(encoder.head(encoder.trunk(images), wanted=wanted), encoder(images, wanted=wanted))
    with pytest.raises(ValueError, match="this encoder takes"):
        encoder.trunk(images[..., :16])


@torch.no_grad()
def test_a_replay_uses_the_current_images_tokens_and_weights(encoder):
    target = ReplayedOnCpu(encoder)
    for step, count in enumerate((3, 5, 1)):  # a different number of tokens each time
        images, wanted = images_of(2, seed=step), torch.arange(2 * count).view(2, count) % 16
        assert torch.equal(target(images, wanted=wanted), encoder(images, wanted=wanted))
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    assert (target.captures, target.replays) == (1, 3)


@torch.no_grad()
def test_evaluations_are_not_replayed_and_a_new_batch_size_is_captured(encoder):
    target = ReplayedOnCpu(encoder)
    assert torch.equal(target(images_of(5)), encoder(images_of(5)))
    assert len(target(images_of(2), last=2)) == 2 and target.captures == 0
    for count in (2, 3):
        wanted = torch.zeros(count, 1, dtype=torch.int64)
        assert torch.equal(target(images_of(count), wanted=wanted), encoder(images_of(count), wanted=wanted))
    assert target.captures == 2


@torch.no_grad()
def test_the_old_graph_is_freed_before_a_new_one_is_captured(encoder):
    seen = []

    class Watched(ReplayedOnCpu):
        fails = False

        def _capture(self, images):
            assert all(old() is None for old in seen), "two graphs at once"
            if self.fails:
                raise RuntimeError("out of memory")
            tokens, replay = super()._capture(images)
            seen.extend(map(weakref.ref, (images, tokens, replay)))
            return tokens, replay

    target, wanted = Watched(encoder), torch.zeros(3, 1, dtype=torch.int64)
    target(images_of(2), wanted=wanted[:2])
    target.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        target(images_of(3), wanted=wanted)
    target.fails = False
    assert torch.equal(target(images_of(3), wanted=wanted), encoder(images_of(3), wanted=wanted))
    assert target.captures == 2, "the failed capture left no graph"


def test_without_the_option_the_target_is_called(encoder):
    assert target_forward(EngineConfig(), encoder, CPU) is encoder
    with pytest.raises(AssertionError, match="prepare\\(\\) was given no target"):
        target_forward(EngineConfig(), None, CPU)()


def test_impossible_graphs_are_refused(encoder):
    with pytest.raises(ConfigError, match="cuda_graphs is true but this run is on cpu; set engine.cuda_graphs=false"):
        target_forward(GRAPHS, encoder, CPU)
    with pytest.raises(ConfigError, match="the target's weights are sharded: a graph replays fixed addresses"):
        target_forward(GRAPHS, encoder, CUDA, sharded=True)
    sharded = copy.deepcopy(encoder)
    sharded.blocks[0].__class__ = type("Sharded", (FSDPModule, type(encoder.blocks[0])), {})  # as fully_shard does
    with pytest.raises(ConfigError, match="the target's weights are sharded: a graph replays fixed addresses"):
        target_forward(GRAPHS, sharded, CUDA)
    with pytest.raises(ConfigError, match="only pretraining has a target in its steps; set engine.cuda_graphs=false"):
        target_forward(GRAPHS, None, CUDA)
    with pytest.raises(ConfigError, match="cuda_graphs is true but strategy is fsdp2: a graph replays fixed addresses"):
        EngineConfig(strategy="fsdp2", cuda_graphs=True)
    assert isinstance(target_forward(GRAPHS, encoder, CUDA), GraphedTarget)

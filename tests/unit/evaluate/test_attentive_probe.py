"""Attentive probes: cross-attention as written out, a sweep as its heads one by one, and what they can learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale import rng
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate import attentive_probe
from ijepa_scale.evaluate.attentive_probe import (
    AttentiveHead,
    AttentiveProbe,
    AttentiveRecipe,
    LabelledTokens,
    attentive_predictions,
    attentive_scores,
    attentive_sweep,
)

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
WIDTH, HEADS, CLASSES, PATCHES = 12, 3, 3, 5
RECIPE = AttentiveRecipe(batch_size=16, epochs=4)
SIZES: dict[str, Any] = {"width": WIDTH, "heads": HEADS, "num_classes": CLASSES, "world": ALONE}


def data(count: int = 50, seed: int = 0) -> LabelledTokens:
    """Images whose class shows in one of 5 tokens, any of them, so that a mean hardly tells it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    tokens = 3 * torch.randn(count, PATCHES, WIDTH, generator=generator)
    places = torch.randint(0, PATCHES, (count,), generator=generator)
    tokens[torch.arange(count), places] = 6.0 * F.one_hot(labels, WIDTH)
    tokens[torch.arange(count), places, -1] = 20.0  # marks the token

    def read(batches: list[np.ndarray]) -> Iterator[torch.Tensor]:
        return (tokens[torch.from_numpy(batch)] for batch in batches)

    return LabelledTokens(labels=labels.numpy(), read=read)


def literal(head: AttentiveHead, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-attention with keys and values of all tokens."""
    for block in head.blocks:
        tokens = block(tokens)
    normed = head.norm_tokens(tokens)
    query = head.of_query(head.query).expand(len(tokens), 1, -1)
    q, k, v = (
        x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (query, head.of_keys(normed), head.of_values(normed))
    )
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
    found = head.query + head.proj(attended)
    return head.classify(found + head.mlp(head.norm(found)))


def shaken(blocks: int, seed: int) -> AttentiveHead:
    """A head none of whose parameters is 0 or 1."""
    head = AttentiveHead(WIDTH, HEADS, CLASSES, blocks=blocks, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


@pytest.mark.parametrize("blocks", [1, 4])
def test_scores_and_gradients_are_those_of_cross_attention_written_out(blocks):
    (tokens,) = data().read([np.arange(7)])
    heads = [shaken(blocks, seed) for seed in (1, 2)]
    found = attentive_scores(heads, tokens)
    assert found.shape == (2, 7, CLASSES)
    for head, scores in zip(heads, found, strict=True):
        expected = literal(head, tokens)
        assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
        names = [name for name, _ in head.named_parameters()]
        weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        of_scores, of_expected = (
            torch.autograd.grad((each * weights).sum(), [*head.parameters()], retain_graph=True)
            for each in (scores, expected)
        )
        for name, one, other in zip(names, of_scores, of_expected, strict=True):
            assert other.abs().max() > 0, name
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max())), name


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_sweep_equals_its_heads_trained_one_by_one(blocks, monkeypatch):
    trained: list[list[AttentiveHead]] = []
    real = attentive_probe._predicted

    def predicted(nets: list[AttentiveHead], *given: Any) -> np.ndarray:
        trained.append(nets)
        return real(nets, *given)

    monkeypatch.setattr(attentive_probe, "_predicted", predicted)
    probes = attentive_sweep(blocks)
    assert len({probe.text() for probe in probes}) == 6
    together = attentive_predictions(data(), data(20, 1), probes, recipe=RECIPE, **SIZES)
    alone = [attentive_predictions(data(), data(20, 1), [probe], recipe=RECIPE, **SIZES) for probe in probes]
    assert np.array_equal(together, np.concatenate(alone))
    swept, *ones = trained
    for net, (one,) in zip(swept, ones, strict=True):
        for a, b in zip(net.parameters(), one.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(swept[0].classify.weight, swept[-1].classify.weight, atol=1e-3)  # rates differ


def test_a_head_equals_a_literal_loop():
    train, test = data(), data(30, 1)
    head = AttentiveHead(WIDTH, HEADS, CLASSES, blocks=1, seed=0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in head.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in head.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    step = 0
    for epoch in range(4):
        order = rng.permutation(50, 0, "attentive-order", epoch)
        for begin in (0, 16, 32):  # the last 2 of 50 are dropped
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * 0.5 * (1 + np.cos(np.pi * step / 12))
            ids = order[begin : begin + 16]
            (tokens,) = train.read([ids])
            optimizer.zero_grad()
            F.cross_entropy(literal(head, tokens), torch.from_numpy(train.labels[ids])).backward()
            optimizer.step()
            step += 1
    (tokens,) = test.read([np.arange(30)])
    probe = AttentiveProbe(lr=3e-3, weight_decay=0.1)
    found = attentive_predictions(train, test, [probe], recipe=RECIPE, **SIZES)
    assert (found[0] == literal(head, tokens).argmax(1).numpy()).all()


def test_the_query_finds_the_token_that_tells_the_class():
    train, test = data(300), data(90, seed=1)
    steps: list[tuple[int, int]] = []
    found = attentive_predictions(
        train, test, [AttentiveProbe(lr=1e-2, weight_decay=0.0)], recipe=AttentiveRecipe(batch_size=50, epochs=15),
        advance=lambda *done: steps.append(done), **SIZES,
    )  # fmt: skip
    assert (found[0] == test.labels).mean() > 0.9
    assert steps == [(n + 1, 90) for n in range(90)]


def test_what_cannot_be_learned_from_is_refused():
    with pytest.raises(DataError, match="labels are from 0 to 2; an attentive probe needs labels from 0 to 1"):
        attentive_predictions(data(), data(), attentive_sweep(1), **{**SIZES, "num_classes": 2})
    with pytest.raises(DataError, match="0 training images"):
        attentive_predictions(data(0), data(), attentive_sweep(1), **SIZES)

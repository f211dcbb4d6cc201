"""Attentive classifiers on frozen patch tokens, all of a sweep in one pass over the tokens.

Knows nothing of encoders or images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_scale import rng
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.models.init import STD, initialise
from ijepa_scale.models.layers import Block, LayerNorm, Linear, Mlp

_BATCH, _LEAST_BATCH, _STEPS = 1024, 32, 78  # an epoch has at least 78 steps, unless its batches are of 32
_MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class AttentiveProbe:
    """One classifier of a sweep."""

    lr: float
    weight_decay: float
    blocks: int = 1  # the last one attends from the query; those before it are transformer blocks on all tokens

    def text(self) -> str:
        """Returns the classifier in words, such as "lr 0.001, wd 0.01"."""
        return f"lr {self.lr:g}, wd {self.weight_decay:g}"


@dataclass(frozen=True, kw_only=True)
class AttentiveRecipe:
    """How the classifiers are trained: AdamW, with a cosine from the rate to 0.

    Source: the released code of V-JEPA (arXiv 2404.08471), its evaluation on ImageNet: 20 epochs of batches of 1024.
    """

    batch_size: int | None = None  # images; None: 1024, or fewer if an epoch had less than 78 steps, but at least 32
    epochs: int = 20
    seed: int = 0

    def batch_of(self, count: int) -> int:
        """Returns the images of a step, if there are `count`."""
        return min(count, self.batch_size or min(_BATCH, max(_LEAST_BATCH, count // _STEPS)))


@dataclass(frozen=True, kw_only=True)
class LabelledTokens:
    """Patch tokens of labelled images, wherever they come from."""

    labels: np.ndarray  # (N,) int64
    read: Callable[[list[np.ndarray]], Iterator[Tensor]]  # batches of numbers -> tokens (n, patches, D) of each, fp32


def attentive_sweep(blocks: int) -> list[AttentiveProbe]:
    """Returns 3 learning rates x 2 weight decays. Source: part of the 5 x 4 of V-JEPA 2's code (arXiv 2506.09985)."""
    return [
        AttentiveProbe(lr=lr, weight_decay=decay, blocks=blocks)
        for lr, decay in itertools.product((3e-4, 1e-3, 3e-3), (0.01, 0.1))
    ]


class AttentiveHead(nn.Module):
    """A learnt query that attends to the tokens, then an MLP and a linear layer.

    The query's own vector is added to what it attended to, and that sum to the MLP's output. Each token passes through
    a layer norm before keys and values.

    Source: arXiv 2404.08471, section 4 ("attentive probing"), and arXiv 2506.09985 (3 transformer blocks before it).
    """

    def __init__(self, width: int, heads: int, num_classes: int, *, blocks: int, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, _MLP_RATIO * width) for _ in range(blocks - 1))
        self.norm_tokens = LayerNorm(width)
        self.of_query = Linear(width, width)
        self.of_keys = Linear(width, width, bias=False)  # a bias would add the same to all tokens of a softmax
        self.of_values = Linear(width, width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width)
        self.mlp = Mlp(width, _MLP_RATIO * width)
        self.classify = Linear(width, num_classes)
        generator = rng.generator(seed, "attentive-weights")
        for part in self.children():
            initialise(part, generator)
        self.query = nn.Parameter(torch.empty(1, width).normal_(0.0, STD, generator=generator))
        self._heads = heads

    def directions(self) -> Tensor:
        """Returns (heads, D): a normalised token's product with these is its attention logit, up to a constant.

        The query is the same for all images, so it is multiplied into the weights of the keys once, instead of these
        with all tokens.
        """
        query = self.of_query(self.query).unflatten(1, (self._heads, -1))[0]  # (heads, D / heads)
        keys = self.of_keys.weight.unflatten(0, (self._heads, -1))  # (heads, D / heads, D)
        return torch.einsum("hk,hkd->hd", query / math.sqrt(query.shape[1]), keys) * self.norm_tokens.weight

    def scores(self, attended: Tensor) -> Tensor:
        """Returns the logits (B, C) of what each head attended to, (B, heads, D): means of normalised tokens.

        Values are computed of these means, since they are linear in the tokens.
        """
        tokens = attended * self.norm_tokens.weight + self.norm_tokens.bias
        weight = self.of_values.weight.unflatten(0, (self._heads, -1))
        values = torch.einsum("bhd,hkd->bhk", tokens, weight).flatten(1) + self.of_values.bias
        found = self.query + self.proj(values)
        return self.classify(found + self.mlp(self.norm(found)))


def attentive_scores(heads: Sequence[AttentiveHead], tokens: Tensor) -> Tensor:
    """Returns the logits (heads, B, C) of tokens (B, patches, D) fp32. Heads of one block share two products."""
    found: list[Tensor] = [tokens.new_empty(0)] * len(heads)
    alone = [[n] for n, head in enumerate(heads) if len(head.blocks)]
    together = [n for n, head in enumerate(heads) if not len(head.blocks)]
    for mine in [*alone, together] if together else alone:
        inputs = tokens
        for block in heads[mine[0]].blocks:
            inputs = block(inputs)
        normed = F.layer_norm(inputs, inputs.shape[2:], eps=heads[mine[0]].norm_tokens.eps)
        directions = torch.cat([heads[n].directions() for n in mine])
        attention = (normed @ directions.T).softmax(dim=1)  # (B, patches, probes * heads)
        attended = attention.transpose(1, 2) @ normed
        for n, part in zip(mine, attended.chunk(len(mine), dim=1), strict=True):
            found[n] = heads[n].scores(part)
    return torch.stack(found)


def attentive_predictions(
    train: LabelledTokens,
    test: LabelledTokens,
    probes: Sequence[AttentiveProbe],
    *,
    width: int,
    heads: int,
    num_classes: int,
    world: World,
    recipe: AttentiveRecipe | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Returns the predicted classes, (probes, M) int64, of the test images, on process 0; (0, M) on the others.

    `width` is that of a token, and `heads` are those of its attention. Every classifier sees the same images in the
    same order, keyed by seed and epoch. An epoch drops the rest of N / batch. Classifiers of one block are trained on
    process 0; of larger ones, each process trains some. `advance` is called with the steps that are done. Communicates,
    so every process must call it.

    Raises:
        DataError: no images, or labels outside the classes.
    """
    recipe = recipe or AttentiveRecipe()
    labels = torch.from_numpy(train.labels)
    if not len(labels):
        raise DataError("0 training images; an attentive probe needs at least 1 labelled training image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels are from {low} to {high}; an attentive probe needs labels from 0 to {num_classes - 1}")
    large = [n for n, probe in enumerate(probes) if probe.blocks > 1]
    small = [n for n, probe in enumerate(probes) if probe.blocks == 1]
    mine = [*(small if world.is_main else []), *large[world.rank :: world.size]]
    nets = [
        AttentiveHead(width, heads, num_classes, blocks=probes[n].blocks, seed=recipe.seed).to(world.device)
        for n in mine
    ]
    optimizer = _optimizer([probes[n] for n in mine], nets)
    count, size = len(labels), recipe.batch_of(len(labels))
    total = recipe.epochs * (count // size)
    for epoch in range(recipe.epochs):
        order = rng.permutation(count, recipe.seed, "attentive-order", epoch)
        batches = [order[begin : begin + size] for begin in range(0, count - size + 1, size)]
        for step, (ids, tokens) in enumerate(zip(batches, train.read(batches), strict=True), epoch * len(batches)):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / total))
                targets = labels[torch.from_numpy(ids)].to(world.device)
                scores = attentive_scores(nets, tokens)
                optimizer.zero_grad()
                every = targets.expand(len(mine), -1).flatten()
                (F.cross_entropy(scores.flatten(0, 1), every, reduction="sum") / len(ids)).backward()
                optimizer.step()
            advance(step + 1, total)
        world.barrier()  # so that no process waits longer than an epoch
    return _predicted(nets, mine, test, len(probes), recipe.batch_of(len(test.labels)), world)


@torch.no_grad()
def _predicted(
    nets: list[AttentiveHead], mine: list[int], test: LabelledTokens, count: int, size: int, world: World
) -> np.ndarray:
    """Returns the predicted classes of all probes on process 0; `mine` are those of this process."""
    batches = np.split(np.arange(len(test.labels)), range(size, len(test.labels), size))
    parts = [
        attentive_scores(nets, tokens).argmax(dim=2).cpu().numpy() if nets else np.empty((0, len(tokens)), np.int64)
        for tokens in test.read(batches)
    ]
    every = world.gather_objects((mine, np.concatenate(parts, axis=1)))
    if not world.is_main:
        return np.empty((0, len(test.labels)), np.int64)
    found = np.empty((count, len(test.labels)), np.int64)
    for places, predicted in cast(list[tuple[list[int], np.ndarray]], every):
        found[places] = predicted
    return found


def _optimizer(probes: list[AttentiveProbe], nets: list[AttentiveHead]) -> torch.optim.AdamW | None:
    """Returns the optimiser of all classifiers; 1-D parameters don't decay."""
    groups = [
        {
            "params": [parameter for parameter in net.parameters() if (parameter.ndim > 1) == decays],
            "peak": probe.lr,
            "weight_decay": probe.weight_decay if decays else 0.0,
        }
        for probe, net in zip(probes, nets, strict=True)
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups) if groups else None

"""Linear classifiers on frozen features by I-JEPA's published protocol, all of a sweep in one pass over the data.

Knows nothing of models or images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ijepa_scale import rng
from ijepa_scale.errors import DataError
from ijepa_scale.optim.lars import LarsOptimizer

_INIT_STD = 0.01  # of the weights. Source: the linear protocols of arXiv 1911.05722 and 2111.06377, A.1
_BATCH, _LEAST_BATCH, _STEPS = 16_384, 32, 78  # 78 batches of 16,384 are an epoch of ImageNet-1k
_LAYERS = {"last": 1, "last4": 4}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One classifier of a sweep."""

    lr: float
    weight_decay: float
    layers: str = "last"  # last | last4: means of the last block's tokens, or of the last four side by side
    batch_norm: bool = False  # normalise by the batch, without weights, before the linear layer

    def text(self) -> str:
        """Returns the classifier in words, such as "last4, BatchNorm, lr 0.05, wd 0.0005"."""
        norm = ", BatchNorm" if self.batch_norm else ""
        return f"{self.layers}{norm}, lr {self.lr:g}, wd {self.weight_decay:g}"


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """How the classifiers are trained: as in arXiv 2301.08243, with LARS."""

    batch_size: int | None = None  # images; None: 16,384, or fewer if an epoch had less than 78 steps, but at least 32
    epochs: int = 50
    drop_every: int = 15  # epochs after which the learning rate is divided by 10
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    batch_norm_eps: float = 1e-6
    seed: int = 0


PUBLISHED_RATES, LARGER_RATES = (0.01, 0.05, 0.001), (0.3, 3.0, 30.0)


def sweep(rates: tuple[float, ...] = PUBLISHED_RATES, layers: tuple[str, ...] = ("last", "last4")) -> list[Probe]:
    """Returns the published sweep: 3 learning rates, decay 5e-4 and 0, with and without BatchNorm; or other rates.

    Under LARS a step is 0.001 times the rate, as a share of the weights' norm, so the published rates need ImageNet's
    many steps; the larger ones suit smaller sets.
    """
    choices = itertools.product(layers, (False, True), rates, (5e-4, 0.0))
    return [Probe(layers=layer, batch_norm=norm, lr=lr, weight_decay=decay) for layer, norm, lr, decay in choices]


@dataclass
class FittedProbes:
    """Trained classifiers."""

    probes: list[Probe]
    norms: nn.ModuleDict  # by layers
    linears: nn.ModuleList  # one per probe
    _width: int = field(repr=False)

    @torch.no_grad()
    def predict(self, features: Tensor | np.ndarray, batch_size: int = 16_384) -> Tensor:
        """Returns the predicted classes, (probes, N) int64, of features (N, D) or (N, 4 D), as they were fitted on."""
        self.norms.eval()
        device = next(self.linears.parameters()).device
        parts = []
        for start in range(0, len(features), batch_size):
            rows = _rows(features, slice(start, start + batch_size), device)
            scores = _scores(self.probes, list(self.linears), self.norms, self._width, rows)
            parts.append(scores.argmax(dim=2))
        return torch.cat(parts, dim=1)


def fit_probes(
    features: Tensor | np.ndarray,
    labels: Tensor,
    probes: list[Probe],
    *,
    width: int,
    num_classes: int,
    device: torch.device | str = "cpu",
    recipe: ProbeRecipe | None = None,
) -> FittedProbes:
    """Returns the classifiers trained on features (N, D) or (N, 4 D) float with labels (N,) int64.

    `width` is D, and the last D columns are those of the last block. Every classifier sees the same images in the same
    order, keyed by seed and epoch, so each is trained as it would be alone. An epoch drops the rest of N / batch. Each
    step reads its rows of `features` anew, so these can be a memory-mapped file.

    Raises:
        DataError: no images, or labels outside the classes.
    """
    recipe = recipe or ProbeRecipe()
    if not len(features):
        raise DataError("0 training features; a linear probe needs at least 1 labelled training image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels are from {low} to {high}; a linear probe needs labels from 0 to {num_classes - 1}")
    norms = nn.ModuleDict(
        {
            name: nn.BatchNorm1d(count * width, eps=recipe.batch_norm_eps, affine=False)
            for name, count in _LAYERS.items()
        }
    ).to(device)
    heads = [_linear(probe, width, num_classes, recipe.seed).to(device) for probe in probes]
    optimizer = LarsOptimizer(
        _groups(probes, heads),
        lr=0.0,
        momentum=recipe.momentum,
        trust_coefficient=recipe.trust_coefficient,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(recipe.epochs):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.1 ** (epoch // recipe.drop_every)
        for ids in _batches(len(features), recipe, epoch):
            targets = labels[torch.from_numpy(ids)].to(device)
            scores = _scores(probes, heads, norms, width, _rows(features, ids, device))  # (probes, B, C)
            optimizer.zero_grad()
            every = targets.expand(len(probes), -1).flatten()
            (cross_entropy(scores.flatten(0, 1), every, reduction="sum") / len(ids)).backward()
            optimizer.step()
    return FittedProbes(probes, norms, nn.ModuleList(heads), width)


def _batches(count: int, recipe: ProbeRecipe, epoch: int) -> Iterator[np.ndarray]:
    order = rng.permutation(count, recipe.seed, "probe-order", epoch)
    size = min(count, recipe.batch_size or min(_BATCH, max(_LEAST_BATCH, count // _STEPS)))
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def _linear(probe: Probe, width: int, num_classes: int, seed: int) -> nn.Linear:
    linear = nn.Linear(_LAYERS[probe.layers] * width, num_classes)
    nn.init.normal_(linear.weight, std=_INIT_STD, generator=rng.generator(seed, "probe-weights"))
    nn.init.zeros_(linear.bias)
    return linear


def _groups(probes: list[Probe], heads: list[nn.Linear]) -> list[dict[str, Any]]:
    """Returns the optimiser's groups: weights and biases of equal settings together."""
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for probe, head in zip(probes, heads, strict=True):
        groups.setdefault((probe.lr, probe.weight_decay, True), []).append(head.weight)
        groups.setdefault((probe.lr, 0.0, False), []).append(head.bias)
    return [
        {"params": params, "lr": lr, "weight_decay": decay, "decay": decays}
        for (lr, decay, decays), params in groups.items()
    ]


def _rows(features: Tensor | np.ndarray, ids: np.ndarray | slice, device: torch.device | str) -> Tensor:
    """Returns rows of the features in float32 on the device."""
    if isinstance(features, Tensor):
        ids = torch.from_numpy(ids) if isinstance(ids, np.ndarray) else ids  # type: ignore[assignment]
        return features[ids].to(device, torch.float32)
    return torch.from_numpy(np.array(features[ids])).to(device, torch.float32)


def _scores(probes: list[Probe], heads: Sequence[nn.Module], norms: nn.ModuleDict, width: int, rows: Tensor) -> Tensor:
    """Returns the scores (probes, B, C) of all classifiers. Those with the same input share one product."""
    found: list[Tensor] = [rows] * len(probes)
    for layers, batch_norm in dict.fromkeys((probe.layers, probe.batch_norm) for probe in probes):
        mine = [n for n, probe in enumerate(probes) if (probe.layers, probe.batch_norm) == (layers, batch_norm)]
        inputs = rows[:, -_LAYERS[layers] * width :]
        weight = torch.cat([cast(nn.Linear, heads[n]).weight for n in mine])
        bias = torch.cat([cast(nn.Linear, heads[n]).bias for n in mine])
        scores = linear(norms[layers](inputs) if batch_norm else inputs, weight, bias)
        for n, part in zip(mine, scores.chunk(len(mine), dim=1), strict=True):
            found[n] = part
    return torch.stack(found)

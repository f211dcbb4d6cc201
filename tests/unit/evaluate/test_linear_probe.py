"""The linear probe: a sweep trained together equals each head trained alone, step by step as LARS says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ijepa_scale import rng
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.linear_probe import Probe, ProbeRecipe, fit_probes, sweep

WIDTH, CLASSES = 6, 3
RECIPE = ProbeRecipe(batch_size=16, epochs=6, drop_every=2)


def data(count: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, 4 x WIDTH) of classes that the last WIDTH columns tell apart, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    features = torch.randn(count, 4 * WIDTH, generator=generator)
    features[:, -CLASSES:] += 6 * torch.nn.functional.one_hot(labels, CLASSES)
    return features, labels


def test_a_sweep_equals_its_heads_trained_one_by_one():
    features, labels = data()
    probes = sweep()
    assert len({probe.text() for probe in probes}) == 24
    together = fit_probes(features, labels, probes, width=WIDTH, num_classes=CLASSES, recipe=RECIPE)
    for probe, linear in zip(probes, together.linears, strict=True):
        alone = fit_probes(features, labels, [probe], width=WIDTH, num_classes=CLASSES, recipe=RECIPE)
        assert torch.allclose(linear.weight, alone.linears[0].weight, rtol=0, atol=1e-6)
        assert torch.allclose(linear.bias, alone.linears[0].bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_equals_a_literal_loop(batch_norm):
    features, labels = data()
    probe = Probe(lr=0.05, weight_decay=0.01, batch_norm=batch_norm)
    fitted = fit_probes(features, labels, [probe], width=WIDTH, num_classes=CLASSES, recipe=RECIPE)
    inputs = features[:, -WIDTH:]
    weight = torch.empty(CLASSES, WIDTH).normal_(0, 0.01, generator=rng.generator(0, "probe-weights")).requires_grad_()
    bias = torch.zeros(CLASSES, requires_grad=True)
    moved, shifted = torch.zeros_like(weight), torch.zeros_like(bias)
    mean, variance = torch.zeros(WIDTH), torch.ones(WIDTH)
    for epoch in range(6):
        lr = 0.05 * 0.1 ** (epoch // 2)
        order = torch.from_numpy(rng.permutation(50, 0, "probe-order", epoch))
        for start in (0, 16, 32):  # the last 2 of 50 are dropped
            rows = order[start : start + 16]
            x = inputs[rows]
            if batch_norm:
                mean = 0.9 * mean + 0.1 * x.mean(0)
                variance = 0.9 * variance + 0.1 * x.var(0)
                x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
            loss = cross_entropy(x @ weight.T + bias, labels[rows])
            of_weight, of_bias = torch.autograd.grad(loss, (weight, bias))
            with torch.no_grad():
                update = of_weight + 0.01 * weight
                moved = 0.9 * moved + 0.001 * weight.norm() / update.norm() * update
                shifted = 0.9 * shifted + of_bias
                weight -= lr * moved
                bias -= lr * shifted
    assert torch.allclose(fitted.linears[0].weight, weight, rtol=0, atol=1e-6)
    assert torch.allclose(fitted.linears[0].bias, bias, rtol=0, atol=1e-6)
    x = (inputs - mean) / (variance + 1e-6).sqrt() if batch_norm else inputs
    assert torch.equal(fitted.predict(features)[0], (x @ weight.T + bias).argmax(1))


def test_what_the_last_columns_hold_is_learned_and_a_memory_mapped_file_gives_the_same(tmp_path):
    features, labels = data(300)
    test, answers = data(90, seed=1)
    probes = [Probe(lr=10.0, weight_decay=0.0), Probe(lr=10.0, weight_decay=0.0, layers="last4", batch_norm=True)]
    recipe = ProbeRecipe(batch_size=64, epochs=30)
    fitted = fit_probes(features, labels, probes, width=WIDTH, num_classes=CLASSES, recipe=recipe)
    predicted = fitted.predict(test, batch_size=40)
    assert ((predicted == answers).float().mean(dim=1) > 0.95).all()
    np.save(tmp_path / "features.npy", features.numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    again = fit_probes(mapped, labels, probes, width=WIDTH, num_classes=CLASSES, recipe=recipe)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(fitted.linears, again.linears, strict=True))


def test_one_layer_alone_needs_no_others():
    features, labels = data()
    probe = [Probe(lr=0.05, weight_decay=0.0)]
    narrow = fit_probes(features[:, -WIDTH:], labels, probe, width=WIDTH, num_classes=CLASSES, recipe=RECIPE)
    wide = fit_probes(features, labels, probe, width=WIDTH, num_classes=CLASSES, recipe=RECIPE)
    assert torch.equal(narrow.linears[0].weight, wide.linears[0].weight)


def test_labels_outside_the_classes_are_refused():
    features, labels = data()
    with pytest.raises(DataError, match="labels are from 0 to 2; a linear probe needs labels from 0 to 1"):
        fit_probes(features, labels, sweep(), width=WIDTH, num_classes=2)
    with pytest.raises(DataError, match="0 training features"):
        fit_probes(features[:0], labels[:0], sweep(), width=WIDTH, num_classes=2)

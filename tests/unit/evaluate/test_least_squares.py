"""The linear layer in closed form, against scikit-learn's ridge regression and on what it must and can't separate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from ijepa_scale.evaluate.least_squares import linear_accuracy


def blobs(seed: int, count: int, classes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % classes
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize(("classes", "width"), [(3, 5), (4, 16), (7, 40)])
def test_it_agrees_with_scikit_learn(classes: int, width: int) -> None:
    train, labels = blobs(0, 200, classes, width)
    test, wanted = blobs(1, 150, classes, width)
    scaler = StandardScaler().fit(train.double().numpy())
    peer = RidgeClassifier(alpha=1e-4 * len(train)).fit(scaler.transform(train.double().numpy()), labels.numpy())
    expected = float((peer.predict(scaler.transform(test.double().numpy())) == wanted.numpy()).mean())
    found = linear_accuracy(train, labels, test, wanted, num_classes=classes)
    assert 1.3 / classes < found < 1 and found == pytest.approx(expected)


def test_features_that_say_nothing_give_the_commonest_class() -> None:
    labels = torch.tensor([0, 0, 1])
    assert (
        linear_accuracy(torch.ones(3, 4), labels, torch.ones(4, 4), torch.tensor([0, 0, 0, 1]), num_classes=2) == 0.75
    )
    assert np.isfinite(linear_accuracy(torch.zeros(3, 4), labels, torch.randn(4, 4), torch.zeros(4), num_classes=2))

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ijepa_scale.errors import DataError
from ijepa_scale.evaluate import knn
from ijepa_scale.evaluate.knn import knn_accuracy, knn_predict, knn_sweep


def clusters(count: int, seed: int, noise: float = 1.0, dim: int = 12, classes: int = 5):
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, dim, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, dim, generator=generator), labels


def brute_force(train, train_labels, test, neighbors, temperature, classes):
    predictions = []
    for query in test.double():
        similarity = [float(query @ other / (query.norm() * other.norm())) for other in train.double()]
        best = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:neighbors]
        votes = [0.0] * classes
        for i in best:
            votes[int(train_labels[i])] += math.exp(similarity[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("neighbors,temperature", [(1, 0.07), (7, 0.07), (20, 1.0), (500, 0.5)])
def test_votes_equal_brute_force(neighbors, temperature, monkeypatch):
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", 1000)  # several chunks, the last one smaller
    train, train_labels = clusters(150, 0)
    test, test_labels = clusters(47, 1)
    expected = brute_force(train, train_labels, test, neighbors, temperature, 5)
    options = {"neighbors": neighbors, "temperature": temperature, "num_classes": 5}
    assert knn_predict(train, train_labels, test, **options).tolist() == expected
    right = sum(p == label for p, label in zip(expected, test_labels.tolist(), strict=True))
    assert knn_accuracy(train, train_labels, test, test_labels, **options) == pytest.approx(right / 47)


def test_length_does_not_matter_and_small_temperature_does_not_overflow():
    train, labels = clusters(50, 0, noise=0.3)
    test, test_labels = clusters(20, 1, noise=0.3)
    scale = torch.linspace(1e-3, 1e3, 50)[:, None]
    options = {"neighbors": 5, "temperature": 1e-3, "num_classes": 5}
    assert knn_accuracy(train * scale, labels, test * 100, test_labels, **options) == 1.0


def test_bf16_features_vote_in_fp32():
    train, labels = clusters(100, 0, noise=0.05)
    options = {"neighbors": 5, "temperature": 0.07, "num_classes": 5}
    assert knn_accuracy(train.bfloat16(), labels, train.bfloat16(), labels, **options) == 1.0


def test_what_cannot_vote_is_refused():
    train, labels = clusters(4, 0)
    options = {"neighbors": 5, "temperature": 0.07, "num_classes": 5}
    with pytest.raises(DataError, match="0 training features; kNN needs at least 1"):
        knn_predict(train[:0], labels[:0], train, **options)
    with pytest.raises(DataError, match="0 test features; kNN needs at least 1"):
        knn_accuracy(train, labels, train[:0], labels[:0], **options)
    with pytest.raises(DataError, match="labels are from -1 to -1; kNN needs labels from 0 to 4: label all images"):
        knn_predict(train, labels * 0 - 1, train, **options)


def test_a_sweep_equals_its_choices_and_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(300, 16, generator=generator), torch.randn(80, 16, generator=generator)
    labels = torch.randint(0, 5, (300,), generator=generator)
    choices = [(1, 0.07), (20, 0.07), (20, 1.0), (1000, 0.1)]
    swept = knn_sweep(train, labels, test, choices=choices, num_classes=5)
    assert swept.shape == (4, 80)
    for found, (neighbors, temperature) in zip(swept, choices, strict=True):
        alone = knn_predict(
            train, labels, test, neighbors=neighbors, temperature=temperature, num_classes=5
        )  # fmt: skip
        assert torch.equal(found, alone)

        def votes(distances: np.ndarray, temperature: float = temperature) -> np.ndarray:
            return np.exp((1 - distances) / temperature)

        peer = KNeighborsClassifier(min(neighbors, 300), metric="cosine", weights=votes, algorithm="brute")
        expected = peer.fit(train.double().numpy(), labels.numpy()).predict(test.double().numpy())
        assert (found.numpy() == expected).all()

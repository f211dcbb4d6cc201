"""The weighted k-nearest-neighbour classifier on frozen features. Knows nothing of models or data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ijepa_scale.errors import DataError

_CHUNK_ELEMENTS = 2**25  # similarities computed at once: 128 MiB of float32


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    neighbors: int,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """Returns the predicted classes (Q,) int64 of the test features (Q, D). Deterministic. Synchronises.

    See `knn_sweep`, of which it is one choice.
    """
    choices = [(neighbors, temperature)]
    return knn_sweep(train_features, train_labels, test_features, choices=choices, num_classes=num_classes)[0]


def knn_sweep(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    choices: Sequence[tuple[int, float]],
    num_classes: int,
) -> Tensor:
    """Returns the predicted classes (choices, Q) int64 of the test features (Q, D) for choices of (k, temperature).

    Each of the k training features (N, D) with the highest cosine similarity votes for its label (N,) with weight
    exp(similarity / temperature); if several classes tie, the lowest wins. Similarities are computed once for all
    choices. Deterministic. Synchronises.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018,
    section 3.4.

    Raises:
        DataError: there are no training features, or a label is outside the classes.
    """
    if not len(train_features):
        raise DataError("0 training features; kNN needs at least 1 labelled training image")
    low, high = int(train_labels.min()), int(train_labels.max())  # host sync
    if low < 0 or high >= num_classes:
        raise DataError(
            f"labels are from {low} to {high}; kNN needs labels from 0 to {num_classes - 1}: label all images"
        )
    bank = normalize(train_features.float(), dim=1).T
    labels = train_labels.to(bank.device)
    most = min(max(neighbors for neighbors, _ in choices), len(train_features))
    predictions: list[Tensor] = []
    for chunk in test_features.split(max(1, _CHUNK_ELEMENTS // max(len(train_features), most * num_classes))):
        similarity = normalize(chunk.float(), dim=1) @ bank
        nearest, index = similarity.topk(most, dim=1)
        votes = one_hot(labels[index], num_classes).float()
        found = []
        for neighbors, temperature in choices:
            # relative to the nearest, so that weights don't overflow and are never all 0
            weights = ((nearest[:, :neighbors] - nearest[:, :1]) / temperature).exp()
            found.append(torch.einsum("qk,qkc->qc", weights, votes[:, :neighbors]).argmax(dim=1))
        predictions.append(torch.stack(found))
    return torch.cat(predictions, dim=1) if predictions else train_labels.new_empty(len(choices), 0)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbors: int,
    temperature: float,
    num_classes: int,
) -> float:
    """Returns the share, 0 to 1, of test features whose label `knn_predict` predicts correctly. Synchronises.

    Raises:
        DataError: see `knn_predict`; or there are no test features.
    """
    if not len(test_features):
        raise DataError("0 test features; kNN needs at least 1 labelled test image")
    predictions = knn_predict(
        train_features,
        train_labels,
        test_features,
        neighbors=neighbors,
        temperature=temperature,
        num_classes=num_classes,
    )
    return (predictions == test_labels.to(predictions.device)).double().mean().item()  # host sync

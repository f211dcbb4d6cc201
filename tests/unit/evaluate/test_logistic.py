"""Logistic regression against scikit-learn's, subsets of a few images, and intervals of accuracies."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.intervals import accuracy_interval
from ijepa_scale.evaluate.logistic import few_shots, held_out, logistic_regression


def data(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    features = generator.normal(size=(count, 12)) * np.geomspace(0.01, 100, 12)
    features[:, :4] += np.eye(4)[labels] * 0.05
    features[:, 11] = 7.0  # the same for every image
    return features.astype(np.float32), labels


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_classes_are_scikit_learns(strength):
    (train, labels), (test, _) = data(200, 0), data(100, 1)
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(train, labels)
    found = logistic_regression(train, labels, test, strengths=(strength,))
    assert (found.predicted == expected.predict(test)).all() and found.strength == strength


def test_the_strength_is_chosen_on_images_held_out_of_training():
    (train, labels), (test, answers) = data(200, 0), data(400, 1)
    found = logistic_regression(train, labels, test)
    accuracy = {
        each: (logistic_regression(train, labels, test, strengths=(each,)).predicted == answers).mean()
        for each in (1e-4, found.strength, 1e3)
    }
    assert accuracy[found.strength] >= max(accuracy.values()) - 0.05
    assert (found.predicted == answers).mean() > 0.5
    held = held_out(labels, seed=0)
    assert len(held) == 40 and (np.bincount(labels[held]) == 10).all()
    assert (held_out(np.array([0, 1, 1]), 0) > 0).all()  # a class of one image stays in training


def test_few_shots_are_nested_keyed_and_balanced():
    labels = np.random.default_rng(0).integers(0, 5, 500)
    one, five, other = few_shots(labels, 1, 0), few_shots(labels, 5, 0), few_shots(labels, 5, 1)
    assert (np.bincount(labels[five]) == 5).all() and set(one) < set(five) and set(five) != set(other)
    assert (few_shots(labels, 5, 0) == five).all()
    with pytest.raises(DataError, match=r"class 0 has 2 images, fewer than 3 shots; use at most 2"):
        few_shots(np.array([0, 0, 1, 1, 1]), 3, 0)


def test_one_class_is_refused():
    with pytest.raises(DataError, match="9 training images of one class"):
        logistic_regression(np.zeros((9, 2)), np.zeros(9), np.zeros((1, 2)))


def test_intervals_are_those_of_resampling():
    correct = np.arange(300) < 210
    generator = np.random.default_rng(0)
    shares = [correct[generator.integers(0, 300, 300)].mean() for _ in range(4000)]
    expected = np.quantile(shares, [0.025, 0.975])
    assert np.allclose(accuracy_interval(210, 300), expected, atol=0.005)
    assert accuracy_interval(300, 300) == (1.0, 1.0)
    low, high = accuracy_interval(210, 300, level=0.5)
    assert expected[0] < low < 0.7 < high < expected[1]
    with pytest.raises(ValueError, match="4 of 3 are correct"):
        accuracy_interval(4, 3)

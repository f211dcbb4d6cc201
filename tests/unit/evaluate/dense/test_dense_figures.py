"""IoU, accuracy and depth errors: equal to values by hand and to scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score

from ijepa_scale.evaluate.dense.figures import class_counts, depth_errors, ious, mean_iou, pixel_accuracy
from ijepa_scale.evaluate.intervals import resampled_intervals


def test_figures_by_hand():
    mask = np.array([[0, 0, 1], [1, 255, 255]])
    predicted = np.array([[0, 1, 1], [1, 2, 0]])
    counts = class_counts(predicted, mask, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [2, 2, 0, 0], [1, 3, 0, 0]]
    assert np.array_equal(ious(counts), [1 / 2, 2 / 3, np.nan, np.nan], equal_nan=True)  # ignored pixels count nowhere
    assert mean_iou(counts) == pytest.approx((1 / 2 + 2 / 3) / 2) and pixel_accuracy(counts) == 3 / 4


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_figures_over_images_are_those_of_scikit_learn_over_their_pixels(num_classes, images, seed):
    generator = np.random.default_rng(seed)
    masks = generator.integers(0, num_classes, (images, 5, 7))
    masks[generator.random(masks.shape) < 0.2] = 255
    masks[:, 0, 0] = 0
    predicted = generator.integers(0, num_classes, masks.shape)
    counts = sum(class_counts(*both, num_classes) for both in zip(predicted, masks, strict=True))
    known = masks != 255
    occurring = np.union1d(masks[known], predicted[known])
    scores = jaccard_score(masks[known], predicted[known], labels=occurring, average=None)
    assert np.allclose(ious(counts)[occurring], scores) and np.isfinite(ious(counts)).sum() == len(occurring)
    assert mean_iou(counts) == pytest.approx(scores.mean())
    assert pixel_accuracy(counts) == pytest.approx(accuracy_score(masks[known], predicted[known]))


def test_depth_errors_by_hand():
    depths = np.array([[1.0, 2.0, np.nan], [4.0, np.nan, 8.0]])
    predicted = np.array([[1.2, 3.0, 100.0], [4.0, 0.0, 6.0]])
    rmse, rel, close = depth_errors(predicted, depths)
    assert rmse == pytest.approx(np.sqrt((0.2**2 + 1 + 0 + 4) / 4))
    assert rel == pytest.approx((0.2 + 0.5 + 0 + 0.25) / 4)
    assert close == 0.5  # 1.2 and 1; 3 / 2, and 8 / 6 are 1.25 or more


def test_an_interval_is_a_point_for_equal_images_and_covers_the_figure_of_others():
    equal = np.tile([[3.0, 4.0]], (20, 1))
    share = lambda sums: sums[:, :1] / sums[:, 1:]  # noqa: E731
    assert resampled_intervals(equal, share).tolist() == [[0.75, 0.75]]
    right = np.random.default_rng(0).random(400) < 0.3
    low, high = resampled_intervals(np.stack([right, np.ones(400)], axis=1), share)[0]
    width = 2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)  # of the normal approximation
    assert low < right.mean() < high and high - low == pytest.approx(width, rel=0.1)
    with pytest.raises(ValueError, match="0 images have no interval; give at least 1"):
        resampled_intervals(np.zeros((0, 2)), share)

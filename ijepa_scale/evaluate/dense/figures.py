"""Figures of dense tasks from each image's counts: IoU, pixel accuracy and depth errors. Knows nothing of models.

Shapes: N images, R sets of images, C classes.
"""

from __future__ import annotations

import numpy as np

from ijepa_scale.evaluate.dense.map_files import IGNORED

DEPTH_FIGURES = ("RMSE", "abs rel", "δ1")
_CLOSE = 1.25  # the ratio of δ1


def class_counts(predicted: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns, for each class, the pixels that are of it and predicted so, that are of it, and that are predicted so.

    `predicted` and `mask` are (H, W) class indices. Pixels that the mask ignores count nowhere. The result is
    (3, C) int64.
    """
    known = mask != IGNORED
    predicted, mask = predicted[known], mask[known]
    parts = (mask[predicted == mask], mask, predicted)
    return np.stack([np.bincount(part, minlength=num_classes) for part in parts])


def ious(counts: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class, (..., C) float64 from 0 to 1, from counts (..., 3, C).

    It is NaN for a class that no pixel has and none was predicted to have.
    """
    both, true, predicted = np.moveaxis(counts, -2, 0).astype(np.float64)
    union = true + predicted - both
    return np.divide(both, union, out=np.full_like(union, np.nan), where=union > 0)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Returns the mean IoU (...) of the classes that occur, from counts (..., 3, C)."""
    return np.nanmean(ious(counts), axis=-1)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Returns the share of pixels that are predicted rightly (...), from counts (..., 3, C)."""
    return counts[..., 0, :].sum(axis=-1) / counts[..., 1, :].sum(axis=-1)


def depth_errors(predicted: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Returns one image's `DEPTH_FIGURES` (3,) float64 over the pixels that have a depth; all depths are above 0.

    RMSE is in the unit of the depths, abs rel a share of the true depth, and δ1 the share of pixels whose predicted and
    true depth differ by a factor of less than 1.25.

    Source: Eigen et al., arXiv 1406.2283, section 4.2.
    """
    known = np.isfinite(depths)
    ours, true = predicted[known].astype(np.float64), depths[known].astype(np.float64)
    ratio = np.maximum(ours / true, true / ours)
    return np.array(
        [np.sqrt(np.mean((ours - true) ** 2)), np.mean(np.abs(ours - true) / true), np.mean(ratio < _CLOSE)]
    )

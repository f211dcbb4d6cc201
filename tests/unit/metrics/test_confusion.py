"""The sparse confusion matrix is the dense one, and its cost doesn't grow with the square of the classes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa_scale.evaluate.classifier_report import class_table
from ijepa_scale.metrics.classifier_plots import draw_confusion
from ijepa_scale.metrics.confusion import Confusion


def dense(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        counts[label, prediction] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60))
def test_it_is_the_dense_matrix(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    counts, found = dense(labels, predictions, 7), Confusion.count(labels, predictions, 7)
    assert np.array_equal(found.part(np.arange(7)), counts)
    assert np.array_equal(found.images, counts.sum(1)) and np.array_equal(found.guesses, counts.sum(0))
    assert np.array_equal(found.right, counts.diagonal())
    wrong = counts - np.diag(counts.diagonal())
    taken, times = found.worst_mistakes()
    assert np.array_equal(times, wrong.max(1))
    assert np.array_equal(taken, np.where(wrong.any(1), wrong.argmax(1), -1))
    mistakes = wrong.sum(0) + wrong.sum(1)
    for count in (0, 3, 7, 9):
        shown = found.most_confused(count)
        assert len(shown) == min(count, 7) and np.array_equal(shown, np.unique(shown))
        left = np.setdiff1d(np.arange(7), shown)
        if len(left) and len(shown):
            assert mistakes[shown].min() >= mistakes[left].max()
        assert np.array_equal(found.part(shown), counts[np.ix_(shown, shown)])


def test_many_classes_cost_little(tmp_path) -> None:  # noqa: ANN001
    """A dense matrix of 21,841 classes has 3.8 GB."""
    labels = np.arange(12) * 1000
    tracemalloc.start()
    confusion = Confusion.count(labels, labels[::-1].copy(), 21_841)
    rows = class_table(confusion, None)
    draw_confusion(confusion, None, tmp_path / "c.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 21_841 and peak < 200e6
    assert rows[1000] == {
        "class": 1000, "images": 1, "recall": 0.0, "precision": 0.0, "most often taken for": 10_000, "times": 1,
    }  # fmt: skip
    assert rows[1] == {
        "class": 1, "images": 0, "recall": None, "precision": None, "most often taken for": "", "times": 0,
    }  # fmt: skip


@pytest.mark.parametrize("num_classes", [2, 30, 31, 1000])
def test_no_more_than_30_classes_are_drawn(tmp_path, monkeypatch, num_classes: int) -> None:  # noqa: ANN001
    drawn = []
    monkeypatch.setattr(
        "ijepa_scale.metrics.classifier_plots.save_figure", lambda figure, path: drawn.append(figure) or path
    )
    labels = np.arange(2 * num_classes) % num_classes
    predictions = np.where(labels % 7 == 1, (labels + 1) % num_classes, labels)
    draw_confusion(Confusion.count(labels, predictions, num_classes), None, tmp_path / "c.png")
    axes = drawn[0].axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert len(names) == min(30, num_classes) and axes.images[0].get_array().shape == (len(names), len(names))
    title = f"The 30 of {num_classes} classes in most mistakes" if num_classes > 30 else ""
    assert axes.get_title() == title
    if num_classes == 1000:
        assert all(int(name) % 7 in (1, 2) for name in names)


def test_the_picture_is_a_png(tmp_path) -> None:  # noqa: ANN001
    path = draw_confusion(Confusion.count(np.array([0, 1]), np.array([0, 0]), 2), ["a", "b"], tmp_path / "c.png")
    with Image.open(path) as picture:
        assert picture.size[0] > 300

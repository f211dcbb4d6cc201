"""Pictures of a finetuning run: its first batch, its curves and its confusion matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ijepa_scale.data.class_names import shortened
from ijepa_scale.metrics.confusion import Confusion
from ijepa_scale.metrics.plots import new_figure, save_figure

_SHOWN_CLASSES = 30  # there is no room for the names of more
_SHOWN_SHARE = 0.02  # smallest share of a soft label that is shown with an image


def label_text(target: Tensor, classes: list[str] | None) -> str:
    """Returns the two largest classes of a soft label (C,) with their shares, without negligible ones."""
    shares, order = target.float().sort(descending=True)
    parts = [
        f"{shortened(classes[number]) if classes else number} {share:.0%}"
        for share, number in zip(shares[:2].tolist(), order[:2].tolist(), strict=True)
        if share >= _SHOWN_SHARE
    ]
    return "\n".join(parts)


def draw_labelled(images: Tensor, targets: Tensor, classes: list[str] | None, path: Path) -> Path:
    """Draws `images` (B, 3, h, w) in [0, 1] with their soft labels `targets` (B, C); returns the path of the PNG."""
    count = len(images)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = new_figure(width=2.1 * columns, height=2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, image, target in zip(axes, images, targets, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(label_text(target, classes), fontsize=8, parse_math=False)
    for axis in axes:
        axis.axis("off")
    return save_figure(figure, path)


def draw_confusion(confusion: Confusion, classes: list[str] | None, path: Path) -> Path:
    """Draws the confusion matrix, or that of the 30 most confused classes; returns the path of the PNG.

    A row is a true class. Its colours are shares of all its images, so that the shares of all classes sum to 1.
    """
    shown = confusion.most_confused(_SHOWN_CLASSES)
    counts = confusion.part(shown)
    shares = counts / np.maximum(1, confusion.images[shown])[:, None]
    side = min(9.0, 3.0 + 0.3 * len(shown))
    figure = new_figure(width=side + 1.0, height=side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    if len(shown) < confusion.num_classes:
        axes.set_title(f"The {len(shown)} of {confusion.num_classes} classes in most mistakes", fontsize=9)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")
    names = [shortened(classes[number]) if classes else str(number) for number in shown.tolist()]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    return save_figure(figure, path)

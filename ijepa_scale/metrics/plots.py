"""Pictures of masks, and what all pictures of a run share. Writes PNG files and opens no window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.masks.types import DenseMasks, Masks
from ijepa_scale.new_file import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#3366aa", "#dd7733", "#339966", "#888888"
_PANEL_SIDE, _FRAME, _HIDDEN = 224, 4, 0.93  # pixels, pixels, grey
_TARGET_COLORS = ("#dd7733", "#339966", "#aa3377", "#ccaa22", "#33bbcc", "#884422")


def draw_line(axes: Axes, rows: list[dict[str, Any]], name: str, color: str, *, title: str) -> None:
    """Draws one field over the steps."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    axes.plot([p[0] for p in points], [p[1] for p in points], color=color, linewidth=1.6)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def mask_grids(masks: Masks, num_images: int, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns which patches are context (B, E, H, W) and target (B, M, H, W), bool, for `num_images` = B images.

    `grid` is (H, W). Synchronises, so use it for pictures only.
    """
    num_patches = grid[0] * grid[1]
    if isinstance(masks, DenseMasks):
        context, targets = ([index.cpu() for index in part.unbind()] for part in (masks.context, masks.targets))
        rows = [[block[b] for block in context] for b in range(num_images)]
        cols = [[block[b] for block in targets] for b in range(num_images)]
    else:
        context_parts = list((masks.context_index.cpu() % num_patches).split(list(masks.context_layout.lengths)))
        sequences = len(context_parts)  # E * B: each target block repeats them
        context_lengths = [len(part) for part in context_parts] * (len(masks.predictor_layout.lengths) // sequences)
        lengths = [n - c for n, c in zip(masks.predictor_layout.lengths, context_lengths, strict=True)]
        target_parts = list((masks.target_index.cpu() % num_patches).split(lengths))
        rows = [context_parts[b::num_images] for b in range(num_images)]
        cols = [target_parts[b::sequences] for b in range(num_images)]
    return _paint(rows, grid), _paint(cols, grid)


def _paint(patches: list[list[Tensor]], grid: tuple[int, int]) -> np.ndarray:
    """Returns (B, blocks, H, W) bool from the patch indices of each image and block."""
    painted = torch.zeros(len(patches), len(patches[0]), grid[0] * grid[1], dtype=torch.bool)
    for b, blocks in enumerate(patches):
        for block, index in enumerate(blocks):
            painted[b, block, index] = True
    return painted.unflatten(2, grid).numpy()


def draw_masks(images: Tensor, context: np.ndarray, targets: np.ndarray, path: str | Path) -> Path:
    """Draws each image, its context and its target blocks; returns the path of the PNG.

    `images` (B, 3, h, w) are uint8, or floats in [0, 1]; pass only a few. `context` (B, E, H, W) and
    `targets` (B, M, H, W) come from `mask_grids`.
    """
    pixels = images.detach().cpu().permute(0, 2, 3, 1).numpy()
    pixels = pixels.astype(np.float64) / 255 if pixels.dtype == np.uint8 else pixels.clip(0.0, 1.0)
    count = len(pixels)
    figure = new_figure(width=1.55 * count + 1.3, height=4.9)
    axes = figure.subplots(3, count, squeeze=False)
    for b, image in enumerate(pixels):
        for row, panel in enumerate(mask_panels(image, context[b], targets[b])):
            axes[row, b].imshow(panel)
    for axis in axes.flatten():
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for row, label in enumerate(("Image", "Context", f"{targets.shape[1]} target blocks")):
        axes[row, 0].set_ylabel(label, fontsize=10)
    return save_figure(figure, path)


def mask_panels(image: np.ndarray, context: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Returns an image, its context alone and its target blocks in frames, each (H, W, 3) uint8 and enlarged.

    `image` is (h, w, 3) in [0, 1]; `context` (E, rows, columns) and `targets` (M, rows, columns) are bool.
    """
    times = max(1, -(-_PANEL_SIDE // min(image.shape[:2])))
    image = np.kron(np.rint(image.astype(np.float64) * 255) / 255, np.ones((times, times, 1)))
    patch = image.shape[0] // context.shape[1], image.shape[1] // context.shape[2]
    seen = np.kron(context.any(0), np.ones(patch, dtype=bool))[..., None]
    blocks = image * 0.25 + 0.7
    for number, target in enumerate(targets):
        rows, columns = np.flatnonzero(target.any(1)), np.flatnonzero(target.any(0))
        top, bottom = rows[0] * patch[0], (rows[-1] + 1) * patch[0]
        left, right = columns[0] * patch[1], (columns[-1] + 1) * patch[1]
        color = _TARGET_COLORS[number % len(_TARGET_COLORS)]
        blocks[top:bottom, left:right] = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        inner = np.s_[top + _FRAME : bottom - _FRAME, left + _FRAME : right - _FRAME]
        blocks[inner] = image[inner]
    panels = image, np.where(seen, image, _HIDDEN), blocks
    return [(panel * 255 + 0.5).astype(np.uint8) for panel in panels]


def new_figure(*, width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, made without pyplot: no global state, no display."""
    from matplotlib.figure import Figure  # takes 0.5 s to import, so import it only to draw a picture

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the PNG under a temporary name, renames it and returns its path."""
    path = Path(path)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path

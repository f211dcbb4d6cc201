"""Protocols that answer for every pixel from frozen patch tokens. Knows nothing of encoders.

Shapes: N images, P patches, D channels of a token, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ijepa_scale.evaluate.dense.figures import (
    DEPTH_FIGURES,
    class_counts,
    depth_errors,
    ious,
    mean_iou,
    pixel_accuracy,
)
from ijepa_scale.evaluate.dense.map_folders import Kind, MapFolder, read_maps
from ijepa_scale.evaluate.dense.patch_head import (
    HeadRecipe,
    PatchHead,
    binned_depth,
    depth_loss,
    fit_head,
    mask_loss,
    on_device,
    upsampled,
)
from ijepa_scale.evaluate.dense.patch_memory import PatchMemory
from ijepa_scale.evaluate.intervals import resampled_intervals

NEIGHBORS, TEMPERATURE = 30, 0.02  # Source: arXiv 2306.01667, appendix
BINS = 256  # of depth. Source: arXiv 2304.07193, section 7.4
DEPTH_RATE = 0.01  # ours: the equal weights that a head of bins starts with take large steps to leave
_SCORES_AT_ONCE = 2**26  # scores of pixels, 256 MiB of float32


@dataclass(frozen=True, kw_only=True)
class DenseSplit:
    """Photographs with maps, and their tokens."""

    tokens: np.ndarray  # (N, P, D) float16, possibly memory-mapped
    source: MapFolder


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """What dense protocols share."""

    grid: tuple[int, int]  # patches
    device: torch.device
    num_classes: int = 0
    depths: tuple[float, float] = (0.0, 0.0)  # the lowest and the highest of the training maps
    patches: int = 200_000  # that the memory of patch-knn holds at most
    workers: int = 0
    seed: int = 0
    recipe: HeadRecipe = HeadRecipe()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of a protocol."""

    protocol: str
    measure: str
    value: float
    low: float  # bounds of the 95% interval over the test images
    high: float
    share: bool = True  # from 0 to 1; otherwise in the unit of the depths
    of_class: int | None = None
    setting: str = ""
    note: str = ""


def segmentation(train: DenseSplit, maps: np.ndarray, test: DenseSplit, options: DenseOptions) -> list[Measure]:
    """Returns mIoU, pixel accuracy and each class's IoU of a linear layer on each patch token."""
    recipe = options.recipe
    head = PatchHead(train.tokens.shape[2], options.num_classes, recipe.seed).to(options.device)
    fit_head(head, train.tokens, maps, lambda outputs: outputs, mask_loss, grid=options.grid, recipe=recipe,
             name="segmentation probe")  # fmt: skip
    return _segmented(
        "segmentation", head, test, options,
        setting=f"lr {recipe.lr:g}, {recipe.epochs} epochs of batches of {recipe.batch_of(len(train.tokens))}",
        note="whole images, not augmented; one scale",
    )  # fmt: skip


def patch_knn(train: DenseSplit, maps: np.ndarray, test: DenseSplit, options: DenseOptions) -> list[Measure]:
    """Returns the same figures of the nearest of the training images' patches."""
    memory = PatchMemory(
        train.tokens, maps, options.grid, options.num_classes, limit=options.patches, seed=options.seed,
        device=options.device,
    )  # fmt: skip

    def shares(tokens: Tensor) -> Tensor:
        found = memory(tokens.flatten(0, 1), neighbors=NEIGHBORS, temperature=TEMPERATURE)
        return found.unflatten(0, tokens.shape[:2])

    return _segmented(
        "patch-knn", shares, test, options,
        setting=f"k {NEIGHBORS}, temperature {TEMPERATURE:g}, {len(memory.keys)} patches",
        note="nothing is trained; patches drawn uniformly",
    )  # fmt: skip


def depth(train: DenseSplit, maps: np.ndarray, test: DenseSplit, options: DenseOptions) -> list[Measure]:
    """Returns RMSE, abs rel and δ1 of a linear layer on each patch token, over bins of depth."""
    recipe, (lowest, highest) = replace(options.recipe, lr=DEPTH_RATE), options.depths
    head = PatchHead(train.tokens.shape[2], BINS, recipe.seed).to(options.device)
    fit_head(
        head, train.tokens, maps, lambda outputs: binned_depth(outputs, lowest, highest), depth_loss,
        grid=options.grid, recipe=recipe, name="depth probe",
    )  # fmt: skip
    rows = []
    for tokens, depths in _answers(test, options, "depth"):
        found = upsampled(binned_depth(head(tokens), lowest, highest), options.grid, (depths.shape[0], depths.shape[1]))
        rows.append(depth_errors(found[0, 0].cpu().numpy(), depths))
    errors = np.stack(rows)
    bounds = resampled_intervals(errors, lambda sums: sums / len(errors), seed=options.seed)
    setting = f"{BINS} bins from {lowest:g} to {highest:g}, lr {recipe.lr:g}, {recipe.epochs} epochs"
    return [
        Measure(
            protocol="depth", measure=name, value=float(value), low=float(low), high=float(high), share=name != "RMSE",
            setting=setting, note="mean over images; whole images, not augmented",
        )
        for name, value, (low, high) in zip(DEPTH_FIGURES, errors.mean(axis=0), bounds, strict=True)
    ]  # fmt: skip


def _segmented(
    protocol: str, scores_of: Callable[[Tensor], Tensor], test: DenseSplit, options: DenseOptions, *, setting: str,
    note: str,
) -> list[Measure]:  # fmt: skip
    """Returns the figures of scores (B, P, C) that a function gives for tokens (B, P, D)."""
    counts = np.stack(
        [
            class_counts(likeliest(scores_of(tokens), options.grid, mask.shape), mask, options.num_classes)
            for tokens, mask in _answers(test, options, protocol)
        ]
    )
    values = _figures(counts.sum(axis=0))
    occur = np.flatnonzero(np.isfinite(values))  # all but the IoU of classes that are nowhere
    bounds = resampled_intervals(
        counts.reshape(len(counts), -1),
        lambda sums: _figures(sums.reshape(-1, 3, options.num_classes))[:, occur],
        seed=options.seed,
    )
    names: list[tuple[str, int | None]] = [("mIoU", None), ("pixel accuracy", None)]
    names += [("IoU", index) for index in range(options.num_classes)]
    return [
        Measure(
            protocol=protocol, measure=names[place][0], of_class=names[place][1], value=float(values[place]),
            low=float(low), high=float(high), setting=setting, note=note,
        )
        for place, (low, high) in zip(occur.tolist(), bounds, strict=True)
    ]  # fmt: skip


def _figures(counts: np.ndarray) -> np.ndarray:
    """Returns mIoU, pixel accuracy and the classes' IoU (..., 2 + C) of counts (..., 3, C)."""
    whole = np.stack([mean_iou(counts), pixel_accuracy(counts)], axis=-1)
    return np.concatenate([whole, ious(counts)], axis=-1)


def likeliest(scores: Tensor, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Returns the class (H, W) int64 with the highest score at each pixel, of scores (1, P, C) at patches.

    Computes no more than 256 MiB of scores at once, a part of the classes at a time. The lowest class wins a tie.
    """
    height, width = size
    best, index = None, None
    step = max(1, _SCORES_AT_ONCE // (height * width))
    for begin in range(0, scores.shape[2], step):
        value, place = upsampled(scores[..., begin : begin + step], grid, (height, width))[0].max(dim=0)
        if best is None or index is None:
            best, index = value, place
        else:
            index = torch.where(value > best, place + begin, index)
            best = torch.maximum(value, best)
    assert index is not None  # there are classes
    return index.cpu().numpy()


def _answers(test: DenseSplit, options: DenseOptions, name: str) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yields each test image's tokens (1, P, D) on the device, and its map (H, W)."""
    maps = read_maps(test.source, workers=options.workers)
    shown = tqdm(maps, total=len(test.tokens), unit="image", desc=f"{name}, test", disable=None, dynamic_ncols=True)
    for row, values in enumerate(shown):
        yield on_device(test.tokens[row : row + 1], options.device), values


DenseProtocol = Callable[[DenseSplit, np.ndarray, DenseSplit, DenseOptions], list[Measure]]
DENSE_PROTOCOLS: dict[str, DenseProtocol] = {"segmentation": segmentation, "patch-knn": patch_knn, "depth": depth}
NEEDS: dict[str, Kind] = {"segmentation": "masks", "patch-knn": "masks", "depth": "depth"}

"""Mixup, CutMix and label smoothing, with one draw per pair of neighbours in the global batch.

Images 2k and 2k + 1 of the global batch are mixed with each other, by a draw keyed by (seed, step, k). The result is
therefore the same however the batch is split over processes and micro-batches, as long as pairs stay together.
The published recipe draws one share per batch and mixes the batch with its reverse, which depends on the split.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ijepa_scale import rng
from ijepa_scale.augment.pipeline import to_device
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.plurals import counted

_MIX, _SWITCH, _TOP, _LEFT, _DRAWS = range(5)


def check_pairs(batch_size: int, micro_batches: int, config: FinetuneAugmentConfig) -> None:
    """Checks that no micro-batch would split a pair. `batch_size` is that of all the micro-batches together.

    Raises:
        ConfigError: the number of images is odd while mixup or cutmix is on.
    """
    num_images = batch_size // micro_batches
    if num_images % 2 and (config.mixup or config.cutmix):
        even = max(2, num_images - 1) * micro_batches
        raise ConfigError(
            f"a micro-batch has {counted(num_images, 'image')}, but mixup and cutmix mix pairs; "
            f"try data.batch_size={even}, or set augment.mixup=0 and augment.cutmix=0"
        )


class Mixing:
    """Mixes pairs of a micro-batch and makes their soft labels.

    Sources: arXiv 1710.09412 (mixup), arXiv 1905.04899 (CutMix), arXiv 1512.00567 (label smoothing).
    """

    def __init__(self, config: FinetuneAugmentConfig, *, num_classes: int, seed: int) -> None:
        self._config, self._num_classes, self._seed = config, num_classes, seed

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Returns (B, 3, h, w) images, mixed in place, and (B, classes) float32 soft labels; doesn't synchronise.

        `labels` (B,) int64 are on the images' device; `position` is that of the first image in the global batch.

        Raises:
            ConfigError: the number of images or the position is odd while mixup or cutmix is on.
        """
        config = self._config
        smooth = config.label_smoothing / self._num_classes
        soft = torch.full((len(labels), self._num_classes), smooth, device=images.device)
        soft.scatter_(1, labels[:, None], 1.0 - config.label_smoothing + smooth)
        if not (config.mixup or config.cutmix):
            return images, soft
        check_pairs(len(images), 1, config)
        check_pairs(position, 1, config)
        size = (images.shape[-2], images.shape[-1])
        shares, boxes = self.draw(size, step=step, position=position, count=len(images))
        pair_shares, pair_boxes = shares[::2], boxes[::2]  # equal for both images of a pair
        lost = _moved((1.0 - pair_shares)[:, None], images.device)
        # pairs that drew CutMix are mixed inside their box, the others in all pixels
        by_box = _moved(np.any(pair_boxes[:, 2:] > 0, axis=1)[:, None, None, None], images.device)
        inside = _inside(pair_boxes, size, images.device)
        _exchange(images, torch.where(by_box, inside, lost[:, :, None, None]))
        _exchange(soft, lost)
        return images, soft

    def draw(self, size: tuple[int, int], *, step: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the share that each image keeps (count,) float32, and boxes (count, 4): top, left, height, width.

        A height of 0 means no box: the pair is mixed in all pixels, or not at all if its share is 1. For a box that
        is cut at an edge, the share is computed from what is left of it.
        """
        config = self._config
        pairs = np.arange(position // 2, (position + count) // 2)
        draws = rng.uniform(self._seed, "mix", step, pairs, _DRAWS)
        shares, boxes = np.ones(len(pairs), dtype=np.float32), np.zeros((len(pairs), 4), dtype=np.int64)
        for row, pair in enumerate(pairs.tolist()):
            if draws[row, _MIX] >= config.mix_probability:
                continue
            cut = config.cutmix > 0 and (config.mixup == 0 or draws[row, _SWITCH] < config.switch_probability)
            alpha = config.cutmix if cut else config.mixup
            numbers = np.random.Generator(np.random.Philox(key=rng.key(self._seed, "mix.share", step, pair)))
            shares[row] = numbers.beta(alpha, alpha)
            if cut:
                boxes[row] = _box(float(shares[row]), size, draws[row, _TOP], draws[row, _LEFT])
                shares[row] = 1.0 - boxes[row, 2] * boxes[row, 3] / (size[0] * size[1])
        return shares.repeat(2), boxes.repeat(2, axis=0)


def _box(kept: float, size: tuple[int, int], down: float, across: float) -> tuple[int, int, int, int]:
    """Returns top, left, height, width of a box of area share 1 - kept around a uniform centre, cut at the edges."""
    ratio = np.sqrt(1.0 - kept)
    half = [int(side * ratio) // 2 for side in size]
    centre = int(down * size[0]), int(across * size[1])
    begin = [max(0, middle - reach) for middle, reach in zip(centre, half, strict=True)]
    end = [min(side, middle + reach) for side, middle, reach in zip(size, centre, half, strict=True)]
    return begin[0], begin[1], end[0] - begin[0], end[1] - begin[1]


def _exchange(values: Tensor, share: Tensor) -> None:
    """Moves both values of each pair towards each other by `share` (B / 2, ...), in place; 0 changes no bit."""
    first, second = values.unflatten(0, (-1, 2)).unbind(1)
    moved = (second - first).mul_(share)
    first.add_(moved)
    second.sub_(moved)


def _inside(boxes: np.ndarray, size: tuple[int, int], device: torch.device) -> Tensor:
    """Returns (B, 1, h, w) float32: 1 inside each image's box."""
    begins = _moved(boxes[:, :2], device)
    ends = _moved(boxes[:, :2] + boxes[:, 2:], device)
    parts = []
    for axis, length in enumerate(size):
        pixels = torch.arange(length, device=device)[None]
        parts.append((pixels >= begins[:, axis, None]) & (pixels < ends[:, axis, None]))
    return (parts[0][:, None, :, None] & parts[1][:, None, None, :]).float()


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

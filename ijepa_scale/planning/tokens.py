"""Counts the tokens of a micro-batch, from masks drawn as in training. Knows nothing of models or devices.

Drawn masks tell more than bounds: a truncated context is cut to the shortest of its group, far below the largest
block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ijepa_scale.config.schema import MaskConfig
from ijepa_scale.masks import DenseMasks, Masks, MaskSampler
from ijepa_scale.masks.types import target_index

STEPS = 32  # drawn steps; enough to know the mean length of a truncated context within about 2%
_MOST_IMAGES = 128  # images drawn per step, or one whole group; larger micro-batches are extrapolated
_MOST_PARTS = 8  # micro-batches examined in each drawn step


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Numbers of tokens in one micro-batch; means may be fractions."""

    images: float
    patches: int  # of a whole image
    context: float  # summed over images and context blocks
    predicted: float  # rows of the prediction and the target
    predictor: float  # summed over predictor sequences
    wanted: float  # per image: tokens wanted from the target encoder's last block
    packed: bool  # whether sequences of different lengths are packed without padding


@dataclass(frozen=True)
class Draw:
    """The masks of the first images of one step, and the numbers of their tokens per image."""

    masks: Masks
    num_images: int
    contexts: np.ndarray  # (B,) tokens, summed over the context blocks of an image
    predicted: np.ndarray  # (B,) target tokens times context blocks
    distinct: np.ndarray  # (B,) patches that belong to at least one target


@functools.lru_cache(maxsize=32)
def draw_masks(config: MaskConfig, grid: tuple[int, int], *, batch_size: int, seed: int = 0) -> tuple[Draw, ...]:
    """Draws masks for the first `STEPS` steps, for whole groups of a global batch of `batch_size` images.

    Raises:
        ConfigError: the masks can't be drawn on this grid.
    """
    sampler = MaskSampler(config, grid, seed=seed)
    size = config.group_size
    count = min(batch_size, max(size, _MOST_IMAGES // size * size))
    return tuple(_measure(sampler(step, 0, count, batch_size), count, grid) for step in range(STEPS))


def micro_batches(config: MaskConfig, draws: Sequence[Draw], grid: tuple[int, int], size: int) -> list[Tokens]:
    """Returns the tokens of micro-batches of `size` images; if more than the drawn images, scales up the drawn ones."""
    packed = config.context == "packed" or config.group_size % size != 0
    found = []
    for draw in draws:
        window = min(size, draw.num_images)
        for start in range(0, draw.num_images - window + 1, window)[:_MOST_PARTS]:
            part, scale = slice(start, start + window), size / window
            predicted = scale * float(draw.predicted[part].sum())
            context = scale * float(draw.contexts[part].sum())
            found.append(
                Tokens(
                    images=size,
                    patches=grid[0] * grid[1],
                    context=context,
                    predicted=predicted,
                    predictor=config.num_target_blocks * context + predicted,
                    wanted=float(draw.distinct[part].max()),
                    packed=packed,
                )
            )
    return found


def mean_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Returns the mean micro-batch."""
    names = ("context", "predicted", "predictor", "wanted")
    means = {name: float(np.mean([getattr(part, name) for part in parts])) for name in names}
    return Tokens(images=parts[0].images, patches=parts[0].patches, packed=parts[0].packed, **means)


def _measure(masks: Masks, count: int, grid: tuple[int, int]) -> Draw:
    patches = grid[0] * grid[1]
    asked = target_index(masks, patches).numpy()
    image = asked // patches
    if isinstance(masks, DenseMasks):
        contexts = np.full(count, masks.context.shape[0] * masks.context.shape[2])
    else:
        contexts = np.asarray(masks.context_layout.lengths).reshape(-1, count).sum(axis=0)
    return Draw(
        masks=masks,
        num_images=count,
        contexts=contexts,
        predicted=np.bincount(image, minlength=count),
        distinct=np.bincount(np.unique(asked) // patches, minlength=count),
    )

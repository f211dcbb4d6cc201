"""Renders masks as small pictures for people to look at. Must not know how masks are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_scale.masks.types import DenseMasks, Masks


def as_grid(masks: Masks, image: int, grid: tuple[int, int]) -> Tensor:
    """Returns the patches of one image (H, W) int64: 0 unused, 1 context, 2 first target, 3 second target, ....

    All context blocks get the same number. Targets hide context, and later targets hide earlier ones. `image` is
    an index into these masks.

    Raises:
        IndexError: `image` is out of range.
    """
    patches = grid[0] * grid[1]
    picture = torch.zeros(patches, dtype=torch.int64)
    if isinstance(masks, DenseMasks):
        num_images = masks.context.shape[1]
        _check_image(image, num_images)
        picture[masks.context[:, image].flatten().cpu()] = 1
        for block, target in enumerate(masks.targets[:, image].cpu()):
            picture[target] = 2 + block
        return picture.reshape(grid)
    num_sequences = len(masks.context_layout.lengths)  # (e, b)
    context, targets = masks.context_index.cpu(), masks.target_index.cpu()
    num_images = int(context[-1]) // patches + 1  # the last sequence is the last image's
    _check_image(image, num_images)
    picture[context[context // patches == image] % patches] = 1
    bounds = masks.predictor_layout.cu_seqlens.cpu().long()
    sequence = torch.searchsorted(bounds, masks.target_rows.cpu(), right=True) - 1  # (i, e, b) of each target token
    for block in range(len(masks.predictor_layout.lengths) // num_sequences):
        mine = (sequence // num_sequences == block) & (targets // patches == image)
        picture[targets[mine] % patches] = 2 + block
    return picture.reshape(grid)


def _check_image(image: int, num_images: int) -> None:
    if not 0 <= image < num_images:
        raise IndexError(f"image {image} is out of range for masks of {num_images} images; give 0 to {num_images - 1}")

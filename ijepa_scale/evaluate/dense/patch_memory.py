"""Segments images by their patches' nearest neighbours among labelled patches. Knows nothing of encoders or files.

Shapes: N images, P patches, D channels, M remembered patches, C classes, Q queries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa_scale import rng
from ijepa_scale.evaluate.dense.map_files import IGNORED
from ijepa_scale.evaluate.dense.patch_head import on_device

_IMAGES_AT_ONCE = 64
_CHUNK_ELEMENTS = 2**25  # similarities computed at once: 128 MiB of float32


class PatchMemory:
    """Patches of the training images with the share of each class among their labelled pixels.

    At most `limit` patches are kept, drawn by `seed` from those that have a labelled pixel.

    Source: arXiv 2306.01667, section 3. It differs: here patches are drawn uniformly, not by their classes' rarity,
    and images aren't augmented.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        masks: np.ndarray,
        grid: tuple[int, int],
        num_classes: int,
        *,
        limit: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Reads tokens (N, P, D) and masks (N, h, w), both possibly memory-mapped, image by image."""
        labelled = np.concatenate(
            [_pixels(masks[begin : begin + _IMAGES_AT_ONCE], grid) for begin in range(0, len(masks), _IMAGES_AT_ONCE)]
        ).reshape(-1)  # (N * P,) bool
        candidates = np.flatnonzero(labelled)
        order = rng.permutation(len(candidates), seed, "patch-memory")[:limit]
        images, patches = np.divmod(np.sort(candidates[order]), tokens.shape[1])
        self.keys = torch.empty(len(images), tokens.shape[2], device=device)  # (M, D), of length 1
        self.values = torch.empty(len(images), num_classes, device=device)  # (M, C), sums to 1
        for image in np.unique(images).tolist():
            rows = slice(*np.searchsorted(images, [image, image + 1]).tolist())
            chosen = patches[rows]
            self.keys[rows] = normalize(on_device(tokens[image], device)[chosen], dim=1)
            shares = patch_shares(masks[image], grid, num_classes)[chosen]
            self.values[rows] = torch.from_numpy(shares).float().to(device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, *, neighbors: int, temperature: float) -> Tensor:
        """Returns the class shares (Q, C) of tokens (Q, D): those of the nearest patches by cosine similarity.

        Each counts with weight exp(similarity / temperature).
        """
        found = []
        for chunk in normalize(tokens.float(), dim=1).split(max(1, _CHUNK_ELEMENTS // len(self.keys))):
            nearest, index = (chunk @ self.keys.T).topk(min(neighbors, len(self.keys)), dim=1)
            weights = (nearest / temperature).softmax(dim=1)
            found.append(torch.einsum("qk,qkc->qc", weights, self.values[index]))
        return torch.cat(found)


def patch_shares(mask: np.ndarray, grid: tuple[int, int], num_classes: int) -> np.ndarray:
    """Returns the share of each class among the labelled pixels of each patch, (P, C) float64; 0 if it has none."""
    blocks = _blocks(mask[None], grid)[0]  # (P, pixels)
    known = blocks != IGNORED
    cells = np.arange(len(blocks))[:, None] * num_classes + np.where(known, blocks, 0)
    counts = np.bincount(cells[known], minlength=len(blocks) * num_classes).reshape(-1, num_classes)
    return counts / np.maximum(1, counts.sum(axis=1, keepdims=True))


def _pixels(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns whether each patch has a labelled pixel, (N, P) bool."""
    return (_blocks(masks, grid) != IGNORED).any(axis=2)


def _blocks(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns the pixels of each patch, (N, P, pixels), of masks (N, h, w)."""
    count, height, width = masks.shape
    cut = np.asarray(masks).reshape(count, grid[0], height // grid[0], grid[1], width // grid[1])
    return cut.swapaxes(2, 3).reshape(count, grid[0] * grid[1], -1)

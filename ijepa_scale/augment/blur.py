"""Gaussian blur of a batch as two matrix products, with a sigma per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GaussianBlur:
    """Blurs (B, C, h, w) images of one size, mirrored at their edges (without repeating the edge pixel).

    The kernel reaches 3 * max_sigma pixels each way, or less on smaller images.
    """

    def __init__(self, image_size: tuple[int, int], *, max_sigma: float, device: torch.device | str = "cpu") -> None:
        self._radius = math.ceil(3.0 * max_sigma)
        self._bases = [_mirror_basis(size, min(self._radius, size - 1)).to(device) for size in image_size]

    def __call__(self, images: Tensor, sigma: Tensor | None) -> Tensor:
        """Returns the blurred images, computed in float32 whatever autocast says; `sigma` (B, 1, 1, 1) is in pixels."""
        assert sigma is not None
        down, across = self._bases
        with torch.autocast(images.device.type, enabled=False):
            blurred = torch.matmul(images.float(), self._matrix(across, sigma).transpose(2, 3))
            return torch.matmul(self._matrix(down, sigma), blurred)

    @staticmethod
    def _matrix(basis: Tensor, sigma: Tensor) -> Tensor:
        """Returns (B, 1, N, N) weights: row j computes pixel j of a line of N pixels from the line."""
        taps, size, _ = basis.shape
        offsets = torch.arange(taps, dtype=torch.float32, device=basis.device) - taps // 2
        kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)  # (B, taps)
        kernel = kernel / kernel.sum(dim=1, keepdim=True)
        return (kernel @ basis.view(taps, size * size)).view(-1, 1, size, size)


def _mirror_basis(size: int, radius: int) -> Tensor:
    """Returns (2 * radius + 1, size, size): 1 where tap t of pixel j is pixel i, mirrored at the edges."""
    pixels = torch.arange(size)
    source = (pixels + torch.arange(-radius, radius + 1)[:, None]).abs()  # (taps, size)
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    return torch.nn.functional.one_hot(source, size).float()

"""The evaluation transform: turns whole images into model input, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ijepa_kernels.crop_resize import crop_resize
from ijepa_scale.augment.pipeline import to_device
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.eval_reader import covering_size


class EvalTransform:
    """Resizes (bicubic) to cover size / crop_fraction, crops the centre, and normalises.

    The result is within 1 level of `data.center_crop`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop_fraction: float,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        pixels: PixelFormat = RGB8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.image_size, self.crop_fraction = image_size, crop_fraction
        self.device = torch.device(device)
        self._channels = pixels.channels
        mean64, std64 = (torch.tensor(list(values), dtype=torch.float64) for values in (mean, std))
        self._normalise = ((1.0 / (pixels.white * std64)).tolist(), (-mean64 / std64).tolist())

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Returns (B, C, h, w) float32 on the device, from images (H, W, C) of any sizes; doesn't synchronise.

        Images that are resized to the same size are resized together.
        """
        resized = [covering_size(have.shape[:2], self.image_size, self.crop_fraction) for have in images]
        found = torch.empty(len(images), self._channels, *self.image_size, device=self.device)
        for whole in sorted(set(resized)):  # resize first, crop then: the centre's edges need the pixels around it
            rows = np.array([row for row, size in enumerate(resized) if size == whole])
            flat = np.concatenate([images[row].reshape(-1) for row in rows])
            filled = crop_resize(
                to_device(torch.from_numpy(flat), self.device),
                np.array([images[row].shape[:2] for row in rows]),
                whole,
                channels=self._channels,
                interpolation="bicubic",
                normalise=self._normalise,
                dtype=torch.float32,
            )
            top, left = (round((have - want) / 2.0) for have, want in zip(whole, self.image_size, strict=True))
            cut = filled[..., top : top + self.image_size[0], left : left + self.image_size[1]]
            found.index_copy_(0, to_device(torch.from_numpy(rows), self.device), cut)
        return found

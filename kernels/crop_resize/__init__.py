"""Antialiased resizing of a batch of crops of different sizes, as PIL does it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels.crop_resize.reference import crop_resize as crop_resize_reference

INTERPOLATIONS = ("bilinear", "bicubic")


def crop_resize(
    pixels: Tensor,
    sizes: np.ndarray,
    output: tuple[int, int],
    *,
    interpolation: str = "bilinear",
    flip: np.ndarray | None = None,
) -> Tensor:
    """Returns the crops resized to `output` (height, width): (B, 3, h, w) uint8 on the device of `pixels`.

    At most 1 of 255 off PIL's antialiased filter of that name, horizontal pass first (on the CPU bicubic is
    2 off in one value of a million). Doesn't synchronise.

    Args:
        pixels: (bytes,) uint8: crop after crop without gaps, each (height, width, 3), row by row.
        sizes: (B, 2) integers on the host: height and width of each crop.
        output: height and width, pixels.
        interpolation: bilinear (triangle filter) or bicubic (a = -0.5).
        flip: (B,) bool on the host: which results are mirrored left to right.

    Raises:
        ValueError: shapes, dtypes or sizes that don't fit together.
    """
    sizes = np.asarray(sizes)
    _check(pixels, sizes, output, interpolation, flip)
    if pixels.device.type != "cpu":
        return crop_resize_reference(pixels, sizes, output, interpolation=interpolation, flip=flip)
    images = torch.empty(len(sizes), 3, *output, dtype=torch.uint8)
    begin = 0
    for row, (height, width) in enumerate(sizes.tolist()):
        end = begin + 3 * height * width
        crop = pixels[begin:end].view(1, height, width, 3).permute(0, 3, 1, 2)
        begin = end
        # The uint8 path: 25 times as fast as the matrix products on one core.
        resized = F.interpolate(crop, size=output, mode=interpolation, antialias=True)
        images[row] = (resized.flip(-1) if flip is not None and flip[row] else resized)[0]
    return images


def _check(
    pixels: Tensor, sizes: np.ndarray, output: tuple[int, int], interpolation: str, flip: np.ndarray | None
) -> None:
    if pixels.dim() != 1 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels are {tuple(pixels.shape)} {pixels.dtype}; give (bytes,) uint8")
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"sizes are {sizes.shape} {sizes.dtype}; give integers (B, 2)")
    if sizes.min(initial=1) < 1:
        raise ValueError(f"the smallest crop has {sizes.min()} pixels a side; give at least 1")
    needed = 3 * int((sizes[:, 0].astype(np.int64) * sizes[:, 1]).sum())
    if len(pixels) != needed:
        raise ValueError(f"crops of these sizes have {needed} bytes, pixels has {len(pixels)}; leave no gaps")
    if len(output) != 2 or min(output) < 1:
        raise ValueError(f"output is {output}; give (height, width) of at least 1 pixel")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    if flip is not None and np.shape(flip) != (len(sizes),):
        raise ValueError(f"flip is {np.shape(flip)} for {len(sizes)} images; give ({len(sizes)},)")


__all__ = ["INTERPOLATIONS", "crop_resize", "crop_resize_reference"]

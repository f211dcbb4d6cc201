"""The specification of `crop_resize`: two batched matrix products with a filter matrix per sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def crop_resize(
    pixels: Tensor,
    sizes: np.ndarray,
    output: tuple[int, int],
    *,
    channels: int = 3,
    interpolation: str = "bilinear",
    flip: np.ndarray | None = None,
) -> Tensor:
    """Returns the crops resized to `output`: (B, C, h, w); see `ijepa_kernels.crop_resize.crop_resize`.

    Values are levels of uint8 for uint8 pixels, else float32. Computes in float32 whatever autocast says: with bfloat16
    weights levels would be off by up to 2.9 of 255. Rounds uint8 between the passes, as PIL does. Pixels outside a crop
    have weight 0.
    """
    height, width = output
    device = pixels.device
    sizes = np.asarray(sizes, dtype=np.int64)
    canvas = padded(pixels, sizes, channels)
    batch, _, canvas_height, canvas_width = canvas.shape
    flips = np.zeros(batch, dtype=bool) if flip is None else np.asarray(flip, dtype=bool)
    with torch.autocast(device.type, enabled=False):
        across = filter_matrix(sizes[:, 1], width, canvas_width, interpolation, device, flips)  # (B, w, Wc)
        down = filter_matrix(sizes[:, 0], height, canvas_height, interpolation, device)  # (B, h, Hc)
        rows = canvas.reshape(batch, channels * canvas_height, canvas_width).float()
        narrow = torch.bmm(rows, across.transpose(1, 2))  # horizontal pass first
        narrow = (_round(narrow) if pixels.dtype == torch.uint8 else narrow).view(batch, channels, canvas_height, width)
        found = torch.matmul(down[:, None], narrow)
        if pixels.dtype == torch.uint8:
            return _round(found).to(torch.uint8)
        return found.clamp_(0.0, 65535.0) if pixels.dtype == torch.uint16 else found


def padded(pixels: Tensor, sizes: np.ndarray, channels: int = 3) -> Tensor:
    """Returns (B, C, Hc, Wc) of the pixels' type: each crop at the top left of the smallest canvas for them all."""
    canvas_height, canvas_width = sizes.max(axis=0, initial=1).tolist()
    canvas = torch.zeros(len(sizes), channels, canvas_height, canvas_width, dtype=pixels.dtype, device=pixels.device)
    begin = 0
    for row, (height, width) in enumerate(sizes.tolist()):
        crop = pixels[begin : begin + channels * height * width].view(height, width, channels)
        canvas[row, :, :height, :width] = crop.permute(2, 0, 1)
        begin += channels * height * width
    return canvas


def filter_matrix(
    sizes: np.ndarray,
    output: int,
    canvas: int,
    interpolation: str,
    device: torch.device,
    flip: np.ndarray | None = None,
) -> Tensor:
    """Returns (B, output, canvas) float32 weights on `device`: row j of sample b computes output pixel j from a line.

    Output pixel j is centred at (j + 1/2) * s, s = size / output. The filter is stretched by max(s, 1), cut at the
    crop's edges and normalised to sum to 1.
    """
    ratio = sizes.astype(np.float64) / output
    output_centres = np.arange(output) + 0.5
    centres = ratio[:, None] * output_centres  # (B, output), float64 on the host
    if flip is not None:
        centres = np.where(flip[:, None], centres[:, ::-1], centres)
    stretch = np.maximum(ratio, 1.0)[:, None]
    table = np.concatenate([centres, stretch, sizes[:, None]], axis=1).astype(np.float32)
    packed = _to_device(torch.from_numpy(table), device)
    pixels = torch.arange(canvas, dtype=torch.float32, device=device)
    distance = ((pixels + 0.5 - packed[:, :output, None]) / packed[:, output, None, None]).abs()
    weights = _kernel(distance, interpolation)
    weights = weights * (pixels < packed[:, output + 1, None, None])
    return weights / weights.sum(dim=2, keepdim=True)


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """Returns the filter's weight at distance x >= 0: the triangle, or Keys' cubic with a = -0.5.

    Source: R. Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4.
    """
    if interpolation == "bilinear":
        return (1.0 - x).clamp(min=0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _round(values: Tensor) -> Tensor:
    """Rounds and clamps the values in place to what uint8 can hold; they stay floating point."""
    return values.add_(0.5).floor_().clamp_(0.0, 255.0)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`; copies through pinned memory on CUDA, to avoid a synchronisation."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

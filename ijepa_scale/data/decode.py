"""Encoded bytes -> the crop of a training image, RGB. Floor 2: one image at a time, no files and no tensors.

The crop is chosen from the header, so that a JPEG of which it needs only half the resolution is decoded at
half the cost. EXIF orientation is ignored, as torchvision does.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image

from ijepa_scale.errors import DataError

MAX_PIXELS = 1 << 26  # 67 million, decoded to 200 MB; below the size at which PIL warns of decompression bombs
CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2  # uniform numbers that one sample's crop takes
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
_JPEG_MAGIC = b"\xff\xd8\xff"
_REDUCTIONS = (8, 4, 2)
# What PIL's decoders raise on damaged bytes.
_FAILURES = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, struct.error, zlib.error)

Box = tuple[int, int, int, int]  # top, left, height, width


def choose_box(
    height: int, width: int, draws: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Returns the crop (top, left, height, width) that `CROP_DRAWS` numbers in [0, 1) choose, in pixels.

    Ten tries at an area share in `scale` and a log-uniform width / height in `ratio`; where none fits, the
    largest centred crop whose ratio is allowed. The place is drawn once, after the size.

    Source: Inception-style cropping, arXiv 1409.4842 section 6, with torchvision's limits and rounding.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        aspect = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """Returns the whole image, (H, W, 3) uint8.

    Raises:
        DataError: not an image, damaged, or larger than `MAX_PIXELS`.
    """
    if isinstance(data, np.ndarray):
        return data
    size = _jpeg_size(data)
    if size is None:
        return np.asarray(_open(data))
    _check_pixels(*size)
    pixels = _decode_jpeg(data, size, 1)
    return np.asarray(_open(data)) if pixels is None else pixels


def decode_crop(
    data: bytes | np.ndarray,
    draws: Sequence[float],
    output: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Returns the drawn crop of an image, (h, w, 3) uint8, still to be resized to `output` (height, width).

    A crop that is 2, 4, 8 ... times as large as the output in both directions is returned reduced by that power
    of two (JPEG: by decoding fewer DCT frequencies; otherwise: by averaging), its edges rounded to the coarser
    pixels; so a crop's sides are bounded by the output's, whatever the image.

    Raises:
        DataError: not an image, damaged, or larger than `MAX_PIXELS`.
    """
    if isinstance(data, np.ndarray):
        top, left, h, w = choose_box(data.shape[0], data.shape[1], draws, scale, ratio)
        return data[top : top + h, left : left + w]
    size = _jpeg_size(data)
    if size is not None:
        _check_pixels(*size)
        box = choose_box(*size, draws, scale, ratio)
        factor = _reduction(box, output)
        decoded_by = next((step for step in _REDUCTIONS if step <= factor), 1)
        pixels = _decode_jpeg(data, size, decoded_by)
        if pixels is not None:
            return _cut(pixels, _coarse(box, size, factor), factor // decoded_by)
    image = _open(data)
    size = (image.height, image.width)
    box = choose_box(*size, draws, scale, ratio)
    factor = _reduction(box, output)
    return _cut(np.asarray(image), _coarse(box, size, factor), factor)


def _reduction(box: Box, output: tuple[int, int]) -> int:
    """Returns the largest power of two by which the crop stays at least as large as the output."""
    room = min(box[2] // output[0], box[3] // output[1])
    return 1 << (room.bit_length() - 1) if room > 1 else 1


def _coarse(box: Box, size: tuple[int, int], factor: int) -> Box:
    """Returns `box` in blocks of factor x factor pixels, its edges rounded to whole ones inside the image."""
    h, w = (max(1, round(side / factor)) for side in box[2:])
    top = min(-(-size[0] // factor) - h, round(box[0] / factor))
    left = min(-(-size[1] // factor) - w, round(box[1] / factor))
    return top, left, h, w


def _cut(pixels: np.ndarray, box: Box, factor: int) -> np.ndarray:
    """Returns the crop `box`, in blocks of factor x factor of these pixels, each block averaged to one pixel."""
    top, left, h, w = (number * factor for number in box)
    crop = pixels[top : top + h, left : left + w]
    return np.asarray(Image.fromarray(crop).reduce(factor)) if factor > 1 else crop


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG that the fast decoder reads as PIL does; None for anything else."""
    if not data.startswith(_JPEG_MAGIC):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    return (height, width) if space in ("YCbCr", "RGB", "Gray") else None  # CMYK: through PIL


def _decode_jpeg(data: bytes, size: tuple[int, int], factor: int) -> np.ndarray | None:
    """Returns a JPEG's pixels at 1 / factor of its size; None where PIL must have a look."""
    height, width = -(-size[0] // factor), -(-size[1] // factor)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=factor)
    except (
        ValueError,
        KeyError,
    ):  # also for what PIL only warns of: stray bytes between markers, of which ImageNet has some
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _open(data: bytes) -> Image.Image:
    """Returns the image as PIL decodes it, in RGB; its size has been checked before."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_pixels(image.height, image.width)
        image.load()
        if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits: PIL's own conversion would clip
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except DataError:
        raise
    except (*_FAILURES, Image.DecompressionBombError) as error:
        raise DataError(f"no decodable image ({type(error).__name__}: {error}); replace or drop it") from None


def _check_pixels(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"image of {width} x {height} pixels; give at most {MAX_PIXELS} pixels")

"""Decodes the bytes of one image to the RGB crop that training uses. Knows nothing of files or tensors.

The crop is chosen from the header, so a JPEG that is needed at half the resolution is decoded at half the cost. EXIF
orientation is ignored, as in torchvision.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ijepa_scale.data.formats import formats
from ijepa_scale.errors import SampleError

MAX_PIXELS = 1 << 26  # 67 million, 200 MB when decoded; below the size at which PIL warns of decompression bombs
CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2  # uniform random numbers needed for one sample's crop
_JPEG_MAGIC = b"\xff\xd8\xff"
_REDUCTIONS = (8, 4, 2)
_MCU_ROWS = 16  # the most rows that a JPEG codes together, in any subsampling that the fast decoder reads
_BYTES_FOLLOW = re.compile(r"extraneous bytes before marker 0xd[0-9a]")
# the errors that PIL's decoders raise on damaged bytes
_FAILURES = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, struct.error, zlib.error)

Box = tuple[int, int, int, int]  # top, left, height, width


def choose_box(
    height: int, width: int, draws: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Returns the crop (top, left, height, width), in pixels, that `CROP_DRAWS` numbers in [0, 1) choose.

    Tries ten times to draw a share of the area in `scale` and a log-uniform width / height in `ratio`. If none of
    these crops fits into the image, returns the largest centred crop whose ratio is allowed. The crop's corner is
    drawn once, after its size.

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
        SampleError: not an image, damaged, or larger than `MAX_PIXELS`.
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

    A crop that is at least 2, 4, 8 ... times as large as the output in both directions is returned reduced by that
    power of two: a JPEG by decoding fewer DCT frequencies, other formats by averaging. Its edges are rounded to the
    coarser pixels. So the output's sides limit the crop's sides, however large the image is.

    Raises:
        SampleError: not an image, damaged, or larger than `MAX_PIXELS`.
    """
    if isinstance(data, np.ndarray):
        return _cut_drawn(data, draws, output, scale, ratio)
    size = _jpeg_size(data)
    if size is not None:
        _check_pixels(*size)
        box = choose_box(*size, draws, scale, ratio)
        factor = _reduction(box, output)
        decoded_by = next((step for step in _REDUCTIONS if step <= factor), 1)
        coarse = _coarse(box, size, factor)
        pixels = _decode_jpeg(data, size, decoded_by, rows=(coarse[0] + coarse[2]) * factor)
        if pixels is not None:
            return _cut(pixels, coarse, factor // decoded_by)
    return _cut_drawn(np.asarray(_open(data)), draws, output, scale, ratio)


def largest_crop(output: tuple[int, int], ratio: tuple[float, float]) -> int:
    """Returns the largest number of pixels that `decode_crop` returns for an `output` (height, width)."""
    height, width = (2 * side + 1 for side in output)  # the longest sides that aren't halved once more
    longest = _longest_sides(output, ratio)
    return math.ceil(max(height * longest[1], width * longest[0]))


def longest_sides(output: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    """Returns the largest height and the largest width of crops that `decode_crop` returns for an `output`."""
    height, width = _longest_sides(output, ratio)
    return max(2 * output[0] + 1, math.ceil(height)), max(2 * output[1] + 1, math.ceil(width))


def _longest_sides(output: tuple[int, int], ratio: tuple[float, float]) -> tuple[float, float]:
    """Returns bounds of the height and the width of crops whose other side isn't halved once more."""
    # a crop's sides are rounded to whole pixels, by half a pixel at most, and again when it is reduced
    return (2 * output[1] + 2) / ratio[0] + 2, ratio[1] * (2 * output[0] + 2) + 2


def _cut_drawn(
    pixels: np.ndarray,
    draws: Sequence[float],
    output: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Returns the drawn crop of decoded pixels."""
    size = (pixels.shape[0], pixels.shape[1])
    box = choose_box(*size, draws, scale, ratio)
    factor = _reduction(box, output)
    return _cut(pixels, _coarse(box, size, factor), factor)


def _reduction(box: Box, output: tuple[int, int]) -> int:
    """Returns the largest power of two by which the crop can be reduced and still be as large as the output."""
    room = min(box[2] // output[0], box[3] // output[1])
    return 1 << (room.bit_length() - 1) if room > 1 else 1


def _coarse(box: Box, size: tuple[int, int], factor: int) -> Box:
    """Returns `box` in units of factor x factor pixels, its edges rounded to whole blocks inside the image."""
    h, w = (max(1, round(side / factor)) for side in box[2:])
    top = min(-(-size[0] // factor) - h, round(box[0] / factor))
    left = min(-(-size[1] // factor) - w, round(box[1] / factor))
    return top, left, h, w


def _cut(pixels: np.ndarray, box: Box, factor: int) -> np.ndarray:
    """Returns the crop `box`, given in blocks of factor x factor pixels, with each block averaged to one pixel."""
    top, left, h, w = (number * factor for number in box)
    crop = pixels[top : top + h, left : left + w]
    return np.asarray(Image.fromarray(crop).reduce(factor)) if factor > 1 else crop


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG that the fast decoder reads like PIL; None for anything else."""
    if not data.startswith(_JPEG_MAGIC):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    return (height, width) if space in ("YCbCr", "RGB", "Gray") else None  # CMYK is left to PIL


def _decode_jpeg(data: bytes, size: tuple[int, int], factor: int, rows: int | None = None) -> np.ndarray | None:
    """Returns at least the first `rows` rows of a JPEG at 1 / factor of its size; None if PIL must decode it."""
    if rows is not None:
        pixels = _decode_top(data, size, factor, rows)
        if pixels is not None:
            return pixels
    height, width = -(-size[0] // factor), -(-size[1] // factor)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=factor)
    except (ValueError, KeyError):
        # also raised where PIL only warns: stray bytes between markers, as in some images of ImageNet
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _decode_top(data: bytes, size: tuple[int, int], factor: int, rows: int) -> np.ndarray | None:
    """Returns the first `rows` rows (of the full size) as a full decode would, or None.

    A smaller height in the header makes the decoder stop there and then complain about the bytes that follow. It
    reports only the first problem: if that is this complaint, the decoded rows are undamaged.
    """
    height = -(-(rows + 2 * factor) // _MCU_ROWS) * _MCU_ROWS  # the last row's colours lack their neighbours below
    offset = _height_offset(data)
    if offset is None or height + _MCU_ROWS > size[0]:
        return None
    lower = bytearray(data)
    struct.pack_into(">H", lower, offset, height)
    shape = (height // factor, -(-size[1] // factor), 3)
    pixels = np.empty(shape, dtype=np.uint8)
    try:
        options = {"min_height": shape[0], "min_width": shape[1], "min_factor": factor}
        found = simplejpeg.decode_jpeg(lower, "RGB", buffer=pixels, **options).shape
    except (ValueError, KeyError) as error:
        found = shape if _BYTES_FOLLOW.search(str(error)) else None
    return pixels if found == shape else None


def _height_offset(data: bytes) -> int | None:
    """Returns the offset of the height in the header of a baseline JPEG; None for a progressive one."""
    offset = 2
    while offset + 9 < len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in (0xC0, 0xC1):
            return offset + 5
        if marker in (0xC2, 0xDA):
            return None
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return None


def _open(data: bytes) -> Image.Image:
    """Returns the image as PIL decodes it, in RGB; checks its size first."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
        _check_pixels(image.height, image.width)
        image.load()
        if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits: PIL's own conversion would clip
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except SampleError:
        raise
    except UnidentifiedImageError:
        message = f"not an image of a known format ({', '.join(formats())}); replace or drop it"
        raise SampleError(message, "not decodable") from None
    except (*_FAILURES, Image.DecompressionBombError) as error:
        message = f"not a decodable image ({type(error).__name__}: {error}); replace or drop it"
        raise SampleError(message, "not decodable") from None


def _check_pixels(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise SampleError(f"image of {width} x {height} pixels; give 1 to {MAX_PIXELS} pixels", "too many pixels")

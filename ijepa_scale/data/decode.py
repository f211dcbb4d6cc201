"""Decodes the bytes of one image to the RGB crop that training uses. Knows nothing of files or tensors.

The crop is chosen from the header, so no more rows of a JPEG are decoded than it needs.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from ijepa_scale.config.form import DecodeScaling, Exif, Interpolation
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.array_decode import NPY_MAGIC
from ijepa_scale.data.dicom_decode import is_dicom
from ijepa_scale.data.pil_decode import check_pixels, decode_with_pil, orientation_of, turn
from ijepa_scale.data.pixel_format import FormatError
from ijepa_scale.data.stored_values import decode_stored
from ijepa_scale.data.tiff_decode import TIFF_MAGIC
from ijepa_scale.errors import DataError, SampleError

CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2  # uniform random numbers needed for one sample's crop
_JPEG_MAGIC = b"\xff\xd8\xff"
_SCALES = (8, 4, 2)  # only these divisors of a JPEG's size make decoding cheaper
_MCU_ROWS = 16  # the most rows that a JPEG codes together, in any subsampling that the fast decoder reads
_BYTES_FOLLOW = re.compile(r"extraneous bytes before marker 0xd[0-9a]")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

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


@dataclass(frozen=True)
class PixelRules:
    """How encoded images become pixels."""

    exif: Exif = "ignore"  # whether images are turned as their EXIF orientation says
    decode_scaling: DecodeScaling = "none"  # whether large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size
    pixels: PixelFormat = RGB8  # what images become; all but 8-bit RGB is decoded in `deep_decode`


def decode(data: bytes | np.ndarray, exif: Exif = "ignore") -> np.ndarray:
    """Returns the whole image, (H, W, 3) uint8.

    Raises:
        SampleError: not an image, damaged, larger than `MAX_PIXELS`, or with pixels of unknown range.
    """
    if isinstance(data, np.ndarray):
        return data
    size = _jpeg_size(data)
    if size is None:
        return _decode_rest(data, exif)
    check_pixels(*size)
    pixels = _decode_jpeg(data, size, 1)
    if pixels is None:
        return decode_with_pil(data, exif)
    return turn(pixels, orientation_of(data)) if exif == "apply" else pixels


def decode_crop(
    data: bytes | np.ndarray,
    draws: Sequence[float],
    output: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: Interpolation = "bilinear",
    rules: PixelRules | None = None,
) -> np.ndarray:
    """Returns the drawn crop of an image, (h, w, 3) uint8, still to be resized to `output` (height, width).

    A crop that is at least twice as large as the output in both directions is returned resized to it, by PIL with
    `interpolation`. So the output's sides limit the crop's sides, however large the image is.

    With `decode_scaling` dct such a crop of a JPEG is decoded with fewer frequencies, at the smallest of 1/2, 1/4 and
    1/8 of its size that is not smaller than the output.

    Of pixels that need no decoding, such a crop is averaged in blocks of 2, 4, 8 ... pixels instead, its edges rounded
    to whole blocks. Only synthetic images are such pixels; runs on them stay the same bit for bit.

    Raises:
        SampleError: not an image, damaged, larger than `MAX_PIXELS`, or with pixels of unknown range.
    """
    if isinstance(data, np.ndarray):
        return _average(data, choose_box(data.shape[0], data.shape[1], draws, scale, ratio), output)
    rules = rules or PixelRules()
    size = _jpeg_size(data)
    if size is not None:
        check_pixels(*size)
        orientation = orientation_of(data) if rules.exif == "apply" else 1
        seen = size[::-1] if orientation > 4 else size  # height and width after turning
        box = choose_box(*seen, draws, scale, ratio)
        room = _room(box[2:], output) if rules.decode_scaling == "dct" else 1
        step = next((step for step in _SCALES if step <= room), 1)
        pixels = _decode_jpeg(data, size, step, rows=box[0] + box[2] if orientation == 1 else None)
        if pixels is not None:
            return _fit(turn(pixels, orientation), box, step, output, interpolation)
    pixels = _decode_rest(data, rules.exif)
    return _fit(pixels, choose_box(pixels.shape[0], pixels.shape[1], draws, scale, ratio), 1, output, interpolation)


def _decode_rest(data: bytes, exif: Exif) -> np.ndarray:
    """Returns the pixels of what isn't a JPEG: by Pillow, but NPY and DICOM as they are."""
    if data.startswith(NPY_MAGIC) or is_dicom(data):
        return decode_stored(data, RGB8)
    try:
        return decode_with_pil(data, exif)
    except SampleError as error:
        if data[:4] in TIFF_MAGIC and error.kind == "not decodable":
            try:
                decode_stored(data, RGB8)
            except FormatError:  # says which channels it has, where Pillow doesn't know them
                raise
            except DataError:
                pass
        raise


def largest_crop(output: tuple[int, int], ratio: tuple[float, float]) -> int:
    """Returns the largest number of pixels that `decode_crop` returns for an `output` (height, width)."""
    height, width = (2 * side + 1 for side in output)  # longer sides are resized if the other one is as long
    longest = _longest_sides(output, ratio)
    return math.ceil(max(height * longest[1], width * longest[0]))


def longest_sides(output: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int]:
    """Returns the largest height and the largest width of crops that `decode_crop` returns for an `output`."""
    height, width = _longest_sides(output, ratio)
    return max(2 * output[0] + 1, math.ceil(height)), max(2 * output[1] + 1, math.ceil(width))


def _longest_sides(output: tuple[int, int], ratio: tuple[float, float]) -> tuple[float, float]:
    """Returns bounds of the height and the width of crops whose other side isn't twice the output's."""
    # a crop's sides are rounded to whole pixels, by half a pixel at most, and again when it is averaged
    return (2 * output[1] + 2) / ratio[0] + 2, ratio[1] * (2 * output[0] + 2) + 2


def _room(size: tuple[int, int], output: tuple[int, int]) -> int:
    """Returns the largest whole number by which a crop can be reduced and still be as large as the output."""
    return min(size[0] // output[0], size[1] // output[1])


def _average(pixels: np.ndarray, box: Box, output: tuple[int, int]) -> np.ndarray:
    """Returns the crop `box`, averaged by the largest power of two at which it is as large as the output."""
    factor = 1 << max(0, _room(box[2:], output).bit_length() - 1)
    h, w = (max(1, round(side / factor)) for side in box[2:])
    top = min(-(-pixels.shape[0] // factor) - h, round(box[0] / factor))
    left = min(-(-pixels.shape[1] // factor) - w, round(box[1] / factor))
    crop = pixels[top * factor : (top + h) * factor, left * factor : (left + w) * factor]
    return np.asarray(Image.fromarray(crop).reduce(factor)) if factor > 1 else crop


def _fit(pixels: np.ndarray, box: Box, step: int, output: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Returns the crop `box` of pixels that were decoded at 1 / step of their size.

    Resizes it to the output if it is at least twice as large in both directions.
    """
    begins = [begin / step for begin in box[:2]]
    ends = [(begin + side) / step for begin, side in zip(box[:2], box[2:], strict=True)]
    top, left = map(math.floor, begins)
    bottom, right = map(math.ceil, ends)
    crop = pixels[top:bottom, left:right]
    if _room(box[2:], output) < 2:
        return crop
    within = (begins[1] - left, begins[0] - top, ends[1] - left, ends[0] - top)  # of whole pixels if step is 1
    image = Image.fromarray(np.ascontiguousarray(crop))
    return np.asarray(image.resize((output[1], output[0]), FILTERS[interpolation], box=within))


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

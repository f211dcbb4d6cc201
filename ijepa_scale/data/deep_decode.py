"""Decodes and crops images of any number of channels with 8, 16 or floating-point 32 bits, other than 8-bit RGB.

Nothing is converted: a file has the channels and the type that the run reads, or is a bad sample. docs/data.md says
what becomes of each kind of file; a test checks every row of that table.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ijepa_scale.config.form import Exif, Interpolation
from ijepa_scale.config.pixels import MAX_CHANNELS, PixelFormat
from ijepa_scale.data.decode import FILTERS, Box, decode
from ijepa_scale.data.formats import formats
from ijepa_scale.data.pil_decode import orientation_of, turn
from ijepa_scale.data.pixel_format import FormatError, check_format, undecodable
from ijepa_scale.data.stored_values import decode_stored, is_stored
from ijepa_scale.errors import DataError, SampleError

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {2: 3, 4: 2, 6: 4}  # colour type -> channels, of PNG whose 16 bits Pillow would cut to 8
_MODES = {
    "1": (1, "uint8"), "L": (1, "uint8"), "LA": (2, "uint8"), "RGB": (3, "uint8"), "RGBA": (4, "uint8"),
    "I;16": (1, "uint16"), "I;16B": (1, "uint16"), "I;16L": (1, "uint16"), "F": (1, "float32"),
}  # fmt: skip


def decode_deep(data: bytes | np.ndarray, wanted: PixelFormat, exif: Exif = "ignore") -> np.ndarray:
    """Returns the whole image, (H, W, C) of the type that is wanted, which isn't 8-bit RGB.

    Raises:
        SampleError: not an image, damaged, too large, of another format, or with values that aren't finite.
        DataError: a package that reads it isn't installed.
    """
    try:
        pixels = _pixels(data, wanted, exif)
    except DataError:
        raise
    except Exception as error:  # decoders of other projects, on damaged bytes: any error means that one
        raise undecodable(error) from None
    if wanted.dtype == "float32" and not np.isfinite(pixels).all():
        count = int(np.size(pixels) - np.isfinite(pixels).sum())
        raise SampleError(f"{count} of its values are infinite or no number; fill or drop it", "not finite")
    return pixels


def decode_as(wanted: PixelFormat, data: bytes | np.ndarray, exif: Exif = "ignore") -> np.ndarray:
    """Returns the whole image in the format that is wanted, (H, W, C); 8-bit RGB by `decode`, the others as above."""
    return decode(data, exif) if wanted.is_rgb8 else decode_deep(data, wanted, exif)


def stored_format(data: bytes | np.ndarray) -> tuple[int, str]:
    """Returns the channels and the numpy type of an image's values as its file stores them.

    Raises:
        SampleError: not an image, damaged or too large.
        DataError: a package that reads it isn't installed.
    """
    unusual = PixelFormat(MAX_CHANNELS, "float32")  # anything else is refused by its header
    try:
        decode_deep(data, unusual)
    except FormatError as error:
        return error.channels, error.dtype
    return unusual.channels, unusual.dtype


def crop_deep(pixels: np.ndarray, box: Box, output: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Returns the crop `box` of (H, W, C) pixels, resized to `output` if it is twice as large in both directions."""
    top, left, height, width = box
    crop = pixels[top : top + height, left : left + width]
    twice = min(height // output[0], width // output[1]) >= 2
    return resize_deep(crop, output, FILTERS[interpolation]) if twice else crop


def resize_deep(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Returns (H, W, C) pixels resized by PIL to `size` (height, width), in their type.

    Integers are rounded to the nearest level; 16-bit ones are computed in floating point.
    """
    kind = pixels.dtype
    whole = pixels if kind == np.uint8 else pixels.astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(whole[..., channel])).resize(size[::-1], resample))
        for channel in range(pixels.shape[2])
    ]
    found = np.stack(planes, axis=-1)
    return found.round().clip(0, 65535).astype(kind) if kind == np.uint16 else found


def _pixels(data: bytes | np.ndarray, wanted: PixelFormat, exif: Exif) -> np.ndarray:
    if isinstance(data, np.ndarray):
        check_format((data.shape[0], data.shape[1]), data.shape[2], data.dtype.name, wanted)
        return data
    if is_stored(data):
        return decode_stored(data, wanted, exif)
    if data.startswith(_PNG_MAGIC) and data[24:25] == b"\x10" and data[25] in _PNG_COLOURS:
        return _deep_png(data, wanted, exif)
    return _with_pil(data, wanted, exif)


def _deep_png(data: bytes, wanted: PixelFormat, exif: Exif) -> np.ndarray:
    """Returns the pixels of a PNG with 16 bits and several channels, (H, W, C) uint16."""
    import torch
    from torchvision.io import ImageReadMode, decode_image  # takes 2 s to import

    height, width = (int.from_bytes(data[begin : begin + 4], "big") for begin in (20, 16))
    check_format((height, width), _PNG_COLOURS[data[25]], "uint16", wanted)
    planes = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    pixels = planes.permute(1, 2, 0).numpy()
    check_format((pixels.shape[0], pixels.shape[1]), pixels.shape[2], pixels.dtype.name, wanted)
    return turn(pixels, orientation_of(data)) if exif == "apply" else pixels


def _with_pil(data: bytes, wanted: PixelFormat, exif: Exif) -> np.ndarray:
    """Returns the pixels of the first frame of a format that Pillow reads, as they are stored."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError:
        raise SampleError(
            f"not an image of a known format ({', '.join(formats())}, NPY, DICOM); replace or drop it", "not decodable"
        ) from None
    return pixels_of_pil(image, wanted, data if exif == "apply" else b"")


def pixels_of_pil(image: Image.Image, wanted: PixelFormat, turned_as: bytes = b"") -> np.ndarray:
    """Returns the pixels of an opened image as they are stored, (H, W, C), turned as the EXIF of a file says.

    Raises:
        SampleError: its mode has no such pixels.
        FormatError: it isn't of the format that is wanted.
    """
    mode = "I;16" if image.mode == "I" and image.format == "PPM" else image.mode  # Pillow scales it to 16 bits
    if mode not in _MODES:
        raise SampleError(
            f"its pixels are {image.mode} in Pillow's words; save it as grey, RGB or RGBA", "pixel format"
        )
    check_format((image.height, image.width), *_MODES[mode], wanted)
    image.load()
    pixels = np.asarray(image.convert("L") if mode == "1" else image)
    pixels = pixels.astype(wanted.dtype, copy=False).reshape(*pixels.shape[:2], -1)
    return turn(pixels, orientation_of(turned_as)) if turned_as else pixels


__all__ = ["crop_deep", "decode_as", "decode_deep", "pixels_of_pil", "resize_deep", "stored_format"]

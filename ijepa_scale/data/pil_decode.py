"""Decodes what the fast JPEG decoder doesn't read, and turns images as their EXIF says. Knows nothing of crops.

docs/data.md says what becomes of each kind of pixel; a test checks every row of that table.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ijepa_scale.config.form import Exif
from ijepa_scale.data.formats import formats
from ijepa_scale.errors import SampleError

MAX_PIXELS = 1 << 26  # 67 million, 200 MB when decoded; below the size at which PIL warns of decompression bombs
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# the errors that PIL's decoders raise on damaged bytes
_FAILURES = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, ArithmeticError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# orientation -> whether rows and columns change places, then whether rows, and columns, are reversed
_TURNS = {
    2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1),
    5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1), 8: (True, -1, 1),
}  # fmt: skip


def decode_with_pil(data: bytes, exif: Exif) -> np.ndarray:
    """Returns the first frame of an image, (H, W, 3) uint8; checks its size before decoding.

    Raises:
        SampleError: not an image, damaged, too large, or with pixels whose range isn't known.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
        check_pixels(image.height, image.width)
        return rgb_of(image, exif)
    except SampleError:
        raise
    except UnidentifiedImageError:
        message = f"not an image of a known format ({', '.join(formats())}); replace or drop it"
        raise SampleError(message, "not decodable") from None
    except _FAILURES as error:
        message = f"not a decodable image ({type(error).__name__}: {error}); replace or drop it"
        raise SampleError(message, "not decodable") from None


def rgb_of(image: Image.Image, exif: Exif) -> np.ndarray:
    """Returns the pixels of an opened image, (H, W, 3) uint8; loads them if necessary.

    Raises:
        SampleError: their range isn't known.
    """
    image.load()
    return np.asarray(_eight_bits(_turned(image) if exif == "apply" else image).convert("RGB"))


def check_pixels(height: int, width: int) -> None:
    """Checks the size of an image before memory is allocated for it.

    Raises:
        SampleError: it has no pixels or over `MAX_PIXELS`.
    """
    if not 0 < height * width <= MAX_PIXELS:
        raise SampleError(f"image of {width} x {height} pixels; give 1 to {MAX_PIXELS} pixels", "too many pixels")


def orientation_of(data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8, that PIL finds; 1 (as stored) without one, or if it can't be read."""
    if data.startswith(b"\xff\xd8\xff") and b"Exif\0\0" not in data and b"Orientation" not in data:  # the latter: XMP
        return 1
    try:
        return _orientation(Image.open(io.BytesIO(data), formats=formats()))
    except _FAILURES:
        return 1


def orientation_tag(data: bytes | np.ndarray) -> bytes:
    """Returns the EXIF block that keeps the orientation of an image whose pixels are encoded anew; empty without one.

    TIFF has none left: PIL turns it while it decodes.
    """
    orientation = 1 if isinstance(data, np.ndarray) or data[:4] in _TIFF_MAGIC else orientation_of(data)
    if orientation == 1:
        return b""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a view of (H, W, 3) pixels as an EXIF orientation, 1 to 8, says that they are meant to be seen."""
    if orientation == 1:
        return pixels
    swapped, rows, columns = _TURNS[orientation]
    return (pixels.swapaxes(0, 1) if swapped else pixels)[::rows, ::columns]


def _turned(image: Image.Image) -> Image.Image:
    """Returns the image as its EXIF orientation says; TIFF was turned by PIL while it was decoded."""
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _FAILURES:  # damaged metadata says nothing about the pixels
        return 1
    return found if found in _TURNS else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns the image with 8 bits per channel: of 16 bits the upper 8, where PIL's own conversion would clip."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # scaled to 16 bits by PIL
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise SampleError(
            f"its pixels are {kind} of unknown range; save it with 8 or 16 bits per channel", "pixel range"
        )
    image.info.pop("transparency", None)  # PIL warns that it drops it
    return image


__all__ = ["MAX_PIXELS", "check_pixels", "decode_with_pil", "orientation_of", "orientation_tag", "rgb_of", "turn"]

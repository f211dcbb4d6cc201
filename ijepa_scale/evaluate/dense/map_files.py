"""Decodes maps, the answers of dense tasks: a class index or a depth for each pixel. Knows nothing of photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.array_decode import NPY_MAGIC
from ijepa_scale.data.pil_decode import check_pixels, orientation_of, turn
from ijepa_scale.data.pixel_format import FormatError, undecodable
from ijepa_scale.data.stored_values import decode_stored
from ijepa_scale.data.tiff_decode import TIFF_MAGIC
from ijepa_scale.errors import SampleError

IGNORED = 255  # the index of pixels without a class
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOURS = b"\0", (b"\2", b"\4", b"\6")  # colour types of PNG; 3 is a palette, and grey with alpha is a colour
_STRETCHED = {2: 85, 4: 17}  # bits -> factor by which Pillow stretches grey levels to 8 bits
_DEPTH = PixelFormat(1, "float32")


def decode_mask(data: bytes) -> np.ndarray:
    """Returns the class indices of a PNG, (H, W) uint8, turned as its EXIF says; 255 is no class.

    Grey levels are indices, of any number of bits, and so are the entries of a palette, whatever their colours.

    Raises:
        SampleError: it isn't such a PNG, is damaged or too large, or an index is above 255.
    """
    if not data.startswith(_PNG_MAGIC):
        raise SampleError("not a PNG; save masks as PNG, which keeps indices as they are", "mask format")
    bits, kind = data[24:25], data[25:26]
    if kind in _COLOURS:
        raise SampleError(
            "a mask of colours, not of class indices; save it with one index per pixel, as a grey or palette PNG",
            "mask format",
        )
    values = _png(data)
    if values.max() > IGNORED:
        raise SampleError(f"it has the index {values.max()}; give classes 0 to 254, and 255 for none", "mask format")
    if kind == _GREY:
        values = values // _STRETCHED.get(bits[0], 1)
    return np.ascontiguousarray(turn(values.astype(np.uint8), orientation_of(data)))


def decode_depth(data: bytes, scale: float | None) -> np.ndarray:
    """Returns the depths of a file, (H, W) float32, turned as its EXIF says; NaN where there is none.

    NPY and TIFF hold one channel of 32-bit floats, taken as they are. A PNG holds 16-bit integers, which are divided by
    `scale`. Values that are 0, infinity or no number are missing.

    Raises:
        SampleError: it is another file, damaged or too large, needs a scale, or has a negative depth.
        DataError: a package that reads it isn't installed.
    """
    if data.startswith(_PNG_MAGIC):
        if data[24:26] != b"\x10" + _GREY:
            raise SampleError("not a PNG of 16 bits and one channel; save it so, or as float32 NPY or TIFF", "depth")
        if scale is None:
            raise SampleError(
                "integers in a PNG have no unit; give --depth-scale, the integer that stands for a depth of 1, like "
                "1000 for millimetres",
                "depth",
            )
        values = turn(_png(data).astype(np.float32) / scale, orientation_of(data))
    elif data.startswith(NPY_MAGIC) or data[:4] in TIFF_MAGIC:
        try:
            values = decode_stored(data, _DEPTH, "apply")[..., 0]
        except FormatError as error:
            raise SampleError(
                f"{error.channels} channels of {error.dtype}; save depths as 1 channel of float32", "depth"
            ) from None
    else:
        raise SampleError("no NPY, TIFF or PNG; save depths as float32 NPY or TIFF, or as 16-bit PNG", "depth")
    lowest = np.fmin.reduce(values, axis=None, initial=0.0)
    if lowest < 0:
        raise SampleError(
            f"it has the depth {lowest:g}; give depths above 0, and 0 or NaN where there is none", "depth"
        )
    return np.where(np.isfinite(values) & (values > 0), values, np.float32(np.nan))


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the values (H, W) at `size` (h, w): of each new pixel, the one at its centre. Mixes no two values."""
    rows, columns = (
        ((np.arange(want) + 0.5) * have / want).astype(np.int64) for have, want in zip(values.shape, size, strict=True)
    )
    return values[rows[:, None], columns]


def _png(data: bytes) -> np.ndarray:
    """Returns the values of a PNG with one of them per pixel, (H, W), as Pillow reads them."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        check_pixels(image.height, image.width)
        return np.asarray(image)
    except SampleError:
        raise
    except Exception as error:  # Pillow on damaged bytes: any error means that one
        raise undecodable(error) from None

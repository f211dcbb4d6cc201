"""Decodes NPY files, NumPy's format of one array, without pickles. Knows nothing of crops."""

from __future__ import annotations

import io
import math

import numpy as np

from ijepa_scale.config.pixels import MAX_CHANNELS, PixelFormat
from ijepa_scale.data.pixel_format import check_format
from ijepa_scale.errors import SampleError

NPY_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 4096  # bytes; that of an image has about 100, and NumPy pads it to 128
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def decode_npy(data: bytes, wanted: PixelFormat) -> np.ndarray:
    """Returns the array of an NPY file as (H, W, C): a (H, W) one has one channel, of three axes the last has them.

    It is (C, H, W) if the last axis is too long for channels and the first isn't. A view of `data` where possible.

    Raises:
        SampleError: the header is too long, the array isn't an image's, or the bytes don't fill it.
        FormatError: it isn't of the format that is wanted.
        Exception: what NumPy raises on a damaged header.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise SampleError(f"its NPY version is {version}; save it with numpy.save", "not decodable")
    shape, fortran, dtype = _READERS[version](stream, max_header_size=_MAX_HEADER)
    begin = stream.tell()
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or len(shape) not in (2, 3):
        raise SampleError(f"its array is {shape} of {dtype}; give (H, W) or (H, W, C) of numbers", "pixel format")
    first = len(shape) == 3 and shape[2] > MAX_CHANNELS >= shape[0]  # channels come first
    height, width, channels = (*shape, 1) if len(shape) == 2 else (*shape[1:], shape[0]) if first else shape
    check_format((height, width), channels, dtype.name, wanted)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - begin != expected:
        raise SampleError(f"{len(data) - begin} bytes follow its header, not {expected}; replace it", "not decodable")
    flat = np.frombuffer(data, dtype=dtype, offset=begin).astype(dtype.newbyteorder("="), copy=False)
    pixels = flat.reshape(shape, order="F" if fortran else "C")
    return pixels[..., None] if len(shape) == 2 else np.moveaxis(pixels, 0, -1) if first else pixels


__all__ = ["NPY_MAGIC", "decode_npy"]

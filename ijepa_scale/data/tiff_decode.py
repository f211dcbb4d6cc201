"""Decodes TIFF files with any number of bands: interleaved, planar, or one on each page. Knows nothing of crops."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import struct

import numpy as np
import tifffile
from PIL import Image

from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.pil_decode import check_pixels, turn
from ijepa_scale.data.pixel_format import MAX_BYTES, check_format
from ijepa_scale.errors import DataError, SampleError

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_PAGES = 1024
_PALETTE, _WHITE_IS_ZERO = 3, 0  # of the tag PhotometricInterpretation
_ORIENTATION = 274
# Codecs whose output tifffile bounds by the size of the strip or tile: CCITT, LZW, deflate, PackBits, LZMA, Zstandard.
_BOUNDED = {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 50000, 50013}
_JPEG = {6, 7, 33007, 34892}
_JPEG_2000 = {33003, 33004, 33005, 34712}
_WITH_HEADER = {34933: "PNG", 34927: "WEBP", 50001: "WEBP"}  # by Pillow
_SIZ = re.compile(rb"\xff\x4f\xff\x51.{4}(.{16}).{16}(.{2})", re.DOTALL)  # size, offset and components in JPEG 2000
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers that a frame's size follows


def decode_tiff(data: bytes, wanted: PixelFormat, exif: Exif) -> np.ndarray:
    """Returns the bands of a TIFF, (H, W, C).

    The bands of the first page are the channels; if it has one, so have the other pages of its size and type. Pages of
    other sizes (thumbnails, overviews) aren't read. Where zero is white, levels are inverted. Single
    bits are 0 and 255.

    Raises:
        SampleError: it can't be read, has a palette, depth, or a compression whose size can't be bounded.
        FormatError: it isn't of the format that is wanted.
        DataError: it is compressed, and imagecodecs isn't installed.
        Exception: what tifffile and imagecodecs raise on damaged bytes.
    """
    # as plain pages: of the layouts of microscopes, some name other files, which would then be opened
    with tifffile.TiffFile(io.BytesIO(data), is_ome=False, is_mmstack=False, is_ndtiff=False) as file:
        first = file.pages.first
        bands = [first] if first.samplesperpixel > 1 else _bands(file, first)
        height, width = first.imagelength, first.imagewidth
        kind = "no type" if first.dtype is None else "uint8" if first.dtype == np.bool_ else first.dtype.name
        if first.imagedepth > 1 or first.tiledepth > 1 or first.photometric == _PALETTE:
            what = "a palette" if first.photometric == _PALETTE else f"a depth of {first.imagedepth}"
            raise SampleError(f"its pixels have {what}; save them as bands", "pixel format")
        check_format((height, width), first.samplesperpixel if len(bands) == 1 else len(bands), kind, wanted)
        for page in bands:
            _check_codec(page, data)
        planes = [page.asarray(maxworkers=1) for page in bands]
        pixels = np.stack(planes, axis=-1) if first.samplesperpixel == 1 else planes[0]
        if pixels.dtype == np.bool_:
            pixels = np.where(pixels, 255, 0).astype(np.uint8)
        if first.samplesperpixel > 1 and first.planarconfig == 2:
            pixels = np.moveaxis(pixels, 0, -1)
        if first.photometric == _WHITE_IS_ZERO and wanted.dtype != "float32":
            pixels = np.iinfo(wanted.dtype).max - pixels
        if pixels.shape != (height, width, wanted.channels):
            raise SampleError(f"its pixels are {pixels.shape}, not as its header says; replace it", "not decodable")
        orientation = first.tags.valueof(_ORIENTATION, default=1) if exif == "apply" else 1
        return turn(pixels, orientation if orientation in range(1, 9) else 1)


def _bands(file: tifffile.TiffFile, first: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    """Returns the pages that have the size and type of the first one."""
    if len(file.pages) > _MAX_PAGES:
        raise SampleError(f"it has {len(file.pages)} pages; give up to {_MAX_PAGES}", "not decodable")
    pages = [page.aspage() for page in file.pages]
    return [page for page in pages if (page.shape, page.dtype) == (first.shape, first.dtype)]


def _check_codec(page: tifffile.TiffPage, data: bytes) -> None:
    """Checks that decoding a page needs no more memory than its header says."""
    codec, name = int(page.compression), getattr(page.compression, "name", page.compression)
    if codec != 1 and importlib.util.find_spec("imagecodecs") is None:
        raise DataError(
            f"a TIFF is compressed with {name}, and imagecodecs isn't installed; pip install 'ijepa_scale[tiff]', or "
            "save images without compression"
        )
    check_pixels(*page.chunks[-3:-1] if page.axes.endswith("S") else page.chunks[-2:])
    if np.prod(page.chunks, dtype=np.float64) * page.bitspersample / 8 > MAX_BYTES:
        raise SampleError(f"its tiles take over {MAX_BYTES} bytes each; write smaller ones", "too many pixels")
    if codec in _BOUNDED:
        return
    if codec not in _JPEG | _JPEG_2000 and codec not in _WITH_HEADER:
        raise SampleError(
            f"TIFF compression {name} isn't read, since the memory that it needs can't be bounded; save it with "
            "deflate, LZW or Zstandard",
            "not decodable",
        )
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        segment = data[offset : offset + count]
        if segment:
            check_pixels(*_segment_size(codec, segment))


def _segment_size(codec: int, data: bytes) -> tuple[int, int]:
    """Returns the height and width of an image in a strip or tile."""
    if codec in _JPEG:
        return _jpeg_size(data)
    if codec in _JPEG_2000:
        return _jpeg_2000_size(data)
    image = Image.open(io.BytesIO(data), formats=[_WITH_HEADER[codec]])
    return image.height, image.width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Returns the height and width of a JPEG, which may lack its tables."""
    offset = 2
    while offset + 9 <= len(data) and data[offset] == 0xFF:
        if data[offset + 1] in _FRAMES:
            return int.from_bytes(data[offset + 5 : offset + 7], "big"), int.from_bytes(
                data[offset + 7 : offset + 9], "big"
            )
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    raise SampleError("a JPEG in it has no size; replace or drop it", "not decodable")


def _jpeg_2000_size(data: bytes) -> tuple[int, int]:
    """Returns the largest height times components, and width, that a JPEG 2000 says it has."""
    found = [(*struct.unpack(">II", size[:8]), int.from_bytes(parts, "big")) for size, parts in _SIZ.findall(data)]
    if not found:
        raise SampleError("a JPEG 2000 image in it has no size; replace or drop it", "not decodable")
    width, height, components = max(found, key=math.prod)
    return height * components, width


__all__ = ["TIFF_MAGIC", "decode_tiff"]

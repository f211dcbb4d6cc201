"""Class indices and depths are read as they were written, whatever the bits, and everything else is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from ijepa_scale.errors import SampleError
from ijepa_scale.evaluate.dense.map_files import decode_depth, decode_mask, nearest

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


def png(values: np.ndarray, bits: int, kind: int = GREY, exif: bytes = b"") -> bytes:
    """A PNG written by hand, since Pillow doesn't write every number of bits; `values` are (H, W) or (H, W, C)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    flat = values.reshape(height, -1)
    rows = b""
    for row in flat:
        ones = "".join(f"{value:0{bits}b}" for value in row.tolist())
        ones += "0" * (-len(ones) % 8)
        rows += b"\0" + int(ones, 2).to_bytes(len(ones) // 8, "big")
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    colours = chunk(b"PLTE", np.random.default_rng(0).bytes(3 * 2**bits)) if kind == PALETTE else b""
    turned = chunk(b"eXIf", exif) if exif else b""
    body = chunk(b"IHDR", head) + turned + colours + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def tiff(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values)
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "JPEG")
    return stream.getvalue()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, GREY), (2, GREY), (4, GREY), (8, GREY), (16, GREY)] + [(b, PALETTE) for b in (1, 2, 4, 8)]),
    st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False),
)  # fmt: skip
def test_indices_are_those_that_were_written(form, height, width, random):
    bits, kind = form
    values = np.array([[random.randrange(min(256, 2**bits)) for _ in range(width)] for _ in range(height)])
    found = decode_mask(png(values, bits, kind))
    assert found.dtype == np.uint8 and np.array_equal(found, values)


def test_a_mask_is_turned_as_its_exif_says():
    values = np.arange(6).reshape(2, 3)
    assert np.array_equal(decode_mask(png(values, 8, exif=oriented(6))), np.rot90(values, -1))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(np.zeros((2, 2, 3), dtype=int), 8, COLOUR), "a mask of colours, not of class indices"),
        (png(np.zeros((2, 2, 4), dtype=int), 8, COLOUR_ALPHA), "a mask of colours"),
        (png(np.zeros((2, 2, 2), dtype=int), 8, GREY_ALPHA), "a mask of colours"),
        (png(np.full((2, 2), 256), 16), "it has the index 256; give classes 0 to 254, and 255 for none"),
        (jpeg(), "not a PNG; save masks as PNG"),
        (png(np.random.default_rng(0).integers(0, 9, (20, 20)), 8)[:90], "not a decodable image"),
        (png(np.zeros((4, 4), dtype=int), 8)[:20], "not a decodable image"),
        (b"", "not a PNG"),
    ],
)
def test_what_holds_no_indices_is_refused(data, said):
    with pytest.raises(SampleError, match=said):
        decode_mask(data)


DEPTHS = np.array([[0.5, 0.0, 2.0], [np.nan, np.inf, 40.0]], dtype=np.float32)
KNOWN = np.array([[0.5, np.nan, 2.0], [np.nan, np.nan, 40.0]], dtype=np.float32)


@pytest.mark.parametrize("data", [npy(DEPTHS), npy(DEPTHS[..., None]), tiff(DEPTHS)])
def test_depths_are_taken_as_they_are_and_the_missing_ones_are_nan(data):
    found = decode_depth(data, None)
    assert np.isnan(decode_depth(npy(np.full((2, 2), np.nan, dtype=np.float32)), None)).all()
    assert found.dtype == np.float32 and np.array_equal(found, KNOWN, equal_nan=True)


def test_integers_are_divided_by_their_scale():
    found = decode_depth(png(np.array([[0, 1000, 65535]]), 16), 1000.0)
    assert np.array_equal(found, np.array([[np.nan, 1.0, 65.535]], dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(np.zeros((2, 2), dtype=int), 16), "integers in a PNG have no unit; give --depth-scale"),
        (png(np.zeros((2, 2), dtype=int), 8), "not a PNG of 16 bits and one channel"),
        (png(np.zeros((2, 2, 3), dtype=int), 16, COLOUR), "not a PNG of 16 bits and one channel"),
        (npy(DEPTHS.astype(np.float64)), "1 channels of float64; save depths as 1 channel of float32"),
        (tiff(np.zeros((4, 4, 3), dtype=np.uint8)), "3 channels of uint8"),
        (npy(-DEPTHS[:, :1]), "it has the depth -0.5; give depths above 0"),
        (jpeg(), "no NPY, TIFF or PNG"),
        (npy(DEPTHS)[:-3], "bytes follow its header"),
    ],
)
def test_what_holds_no_depths_is_refused(data, said):
    with pytest.raises(SampleError, match=said):
        decode_depth(data, None)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_nearest_picks_the_pixel_at_the_centre_of_each(height, width, to_height, to_width):
    values = np.arange(height * width).reshape(height, width)
    found = nearest(values, (to_height, to_width))
    for row in range(to_height):
        for column in range(to_width):
            place = (2 * row + 1) * height // (2 * to_height), (2 * column + 1) * width // (2 * to_width)
            assert found[row, column] == values[place]

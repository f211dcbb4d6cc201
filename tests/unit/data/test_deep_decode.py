"""Images of any channels and depth: each format gives back its values, and whatever doesn't fit is a bad sample."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pydicom.encaps
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data import pixel_format, tiff_decode
from ijepa_scale.data.deep_decode import crop_deep, decode_as, decode_deep, resize_deep
from ijepa_scale.data.eval_reader import center_crop
from ijepa_scale.data.pixel_format import FormatError
from ijepa_scale.errors import DataError, SampleError
from tests.unit.data.deep_images import dicom, npy, png, saved, tiff, values

TYPES = ("uint8", "uint16", "float32")
GREY16 = PixelFormat(1, "uint16")
BANDS = PixelFormat(13, "uint16")
DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def read(data: bytes, channels: int, dtype: str, exif: str = "ignore") -> np.ndarray:
    return decode_deep(data, PixelFormat(channels, dtype), exif)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), channels=st.integers(1, 16), dtype=st.sampled_from(TYPES),
    layout=st.sampled_from(["contig", "separate", "pages"]), order=st.sampled_from("<>"), big=st.booleans(),
    compression=st.sampled_from([None, "zlib", "lzw", "zstd", "lzma", "packbits"]), tiled=st.booleans(),
    predictor=st.booleans(),
)  # fmt: skip
def test_any_tiff_gives_back_its_values(
    height, width, channels, dtype, layout, order, big, compression, tiled, predictor
):
    pixels = values((height, width, channels), dtype)
    if compression in ("zlib", "lzw", "zstd") and predictor:
        predictor = 3 if dtype == "float32" else 2
    options = {"byteorder": order, "bigtiff": big, "compression": compression}
    options |= {"predictor": predictor} if compression in ("zlib", "lzw", "zstd") and predictor else {}
    options |= {"tile": (16, 32)} if tiled else {}
    found = read(tiff(pixels, layout, **options), channels, dtype)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), channels=st.integers(1, 16), dtype=st.sampled_from(TYPES),
    first=st.booleans(), fortran=st.booleans(), big=st.booleans(),
)  # fmt: skip
def test_any_npy_gives_back_its_values(height, width, channels, dtype, first, fortran, big):
    pixels = values((height, width, channels), dtype)
    kept = np.moveaxis(pixels, -1, 0) if first and width > 16 else pixels[..., 0] if channels == 1 else pixels
    kept = np.asfortranarray(kept) if fortran else np.ascontiguousarray(kept)
    found = read(npy(kept.astype(kept.dtype.newbyteorder(">")) if big else kept), channels, dtype)
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 4, 3])
def test_png_gives_back_its_values(channels, dtype):
    pixels = values((9, 7, channels), dtype)
    np.testing.assert_array_equal(decode_as(PixelFormat(channels, dtype), png(pixels)), pixels)


def test_dicom_gives_stored_values_and_rescaled_ones_as_float():
    stored = values((8, 6), "uint16") >> 4
    np.testing.assert_array_equal(read(dicom(stored, bits=12), 1, "uint16")[..., 0], stored)
    np.testing.assert_array_equal(read(dicom(stored, "MONOCHROME1", bits=12), 1, "uint16")[..., 0], 4095 - stored)
    signed = (stored.astype(np.int32) - 2000).astype(np.int16)
    scaled = read(dicom(signed, RescaleSlope=2, RescaleIntercept=-24), 1, "float32")
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled[..., 0], signed * 2.0 - 24)
    colours = values((8, 6, 3), "uint8")
    np.testing.assert_array_equal(decode_as(PixelFormat(), dicom(colours, "RGB")), colours)
    with pytest.raises(FormatError, match="1 channel of int16, but model.channels is 1 and data.pixels is uint16"):
        read(dicom(signed), 1, "uint16")
    frames = np.concatenate([stored, stored + 1])
    np.testing.assert_array_equal(read(dicom(frames, Rows=8, NumberOfFrames=2), 1, "uint16")[..., 0], stored)
    deflated = dicom(stored).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    with pytest.raises(SampleError, match="deflated as a whole"):
        read(deflated, 1, "uint16")


def test_a_compressed_frame_has_the_size_that_its_header_says():
    """Memory is judged by the header, so a frame of another size is refused before it is decoded."""
    colours = values((40, 32, 3), "uint8")
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, "JPEG", quality=95, subsampling=0)
    dataset = pydicom.dcmread(io.BytesIO(dicom(colours, "YBR_FULL")))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])

    def written(**changes: int) -> bytes:
        for name, value in changes.items():
            setattr(dataset, name, value)
        out = io.BytesIO()
        dataset.save_as(out, enforce_file_format=True)
        return out.getvalue()

    assert decode_as(PixelFormat(), written()).shape == (40, 32, 3)
    with pytest.raises(SampleError, match=r"its frame has \(32, 40\) pixels and its header says \(10, 10\)"):
        decode_as(PixelFormat(), written(Rows=10, Columns=10))


def test_bands_under_an_encoder_of_rgb_are_called_by_their_number():
    with pytest.raises(FormatError, match="its pixels have 13 channels of uint16, but model.channels is 3"):
        decode_as(PixelFormat(), tiff(values((12, 16, 13), "uint16")))


GREY8, DEEP = values((16, 24, 1), "uint8"), values((16, 24, 1), "uint16")
RGBA8 = values((16, 24, 4), "uint8")
FILES = {  # the rows of docs/data.md: what a file holds -> (its bytes, channels and type that read it, its values)
    "black and white": (
        saved(Image.fromarray(GREY8[..., 0] > 127)), (1, "uint8"), np.where(GREY8 > 127, 255, 0).astype(np.uint8)),
    "grey": (png(GREY8), (1, "uint8"), GREY8),
    "grey with alpha": (png(RGBA8[..., :2]), (2, "uint8"), RGBA8[..., :2]),
    "RGB": (png(RGBA8[..., :3]), (3, "uint8"), RGBA8[..., :3]),
    "RGBA": (png(RGBA8), (4, "uint8"), RGBA8),
    "16-bit grey": (png(DEEP), (1, "uint16"), DEEP),
    "16-bit RGB": (png(np.repeat(DEEP, 3, 2)), (3, "uint16"), np.repeat(DEEP, 3, 2)),
    "16-bit RGBA": (png(np.repeat(DEEP, 4, 2)), (4, "uint16"), np.repeat(DEEP, 4, 2)),
    "floating point": (saved(Image.fromarray(values((16, 24), "float32")), "TIFF"), (1, "float32"),
                       values((16, 24, 1), "float32")),
}  # fmt: skip
WANTED = [(channels, dtype) for channels in (1, 2, 3, 4, 13) for dtype in TYPES if (channels, dtype) != (3, "uint8")]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: f"{wanted[0]}-{wanted[1]}")
def test_a_file_has_the_format_that_is_read_or_is_a_bad_sample(kind, wanted):
    data, format, pixels = FILES[kind]
    if format == wanted:
        np.testing.assert_array_equal(read(data, *wanted), pixels)
        return
    text = f"its pixels have {format[0]} channels? of {format[1]}, but model.channels is {wanted[0]} and data.pixels is"
    with pytest.raises(FormatError, match=f"{text} {wanted[1]}; convert, replace or drop it") as error:
        read(data, *wanted)
    assert error.value.kind == "pixel format"


def test_the_table_of_other_formats_has_these_rows():
    section = DOCS.read_text().split("### Other channels and types")[1].split("\n#")[0]
    rows = [row for row in re.findall(r"^\| ([^|]+?) \| `?([^|`]+?)`? \|", section, flags=re.MULTILINE)][1:]
    documented = {file: wanted for file, wanted in rows}
    assert {kind: f"{channels}, {dtype}" for kind, (_, (channels, dtype), _) in FILES.items()}.items() <= (
        documented.items()
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (saved(Image.fromarray(RGBA8[..., :3]).quantize(4)), "its pixels are P in Pillow's words"),
        (saved(Image.fromarray(RGBA8, "CMYK"), "JPEG"), "its pixels are CMYK in Pillow's words"),
        (saved(Image.fromarray(RGBA8[..., :3]).quantize(4), "TIFF"), "its pixels have a palette"),
        (npy(np.zeros((2, 3, 4, 5), np.uint16)), r"its array is \(2, 3, 4, 5\) of uint16"),
        (npy(np.array([[None]], dtype=object)), "of object; give"),
        (npy(np.zeros(3, dtype=[("a", "u2")])[None]), "give .H, W. or .H, W, C. of numbers"),
        (npy(DEEP)[:-1], "bytes follow its header, not 768"),
        (npy(DEEP) + b"\0", "769 bytes follow its header, not 768"),
        (b"text", "not an image of a known format .*NPY, DICOM"),
        (tiff(np.zeros((4, 4, 1), np.uint16), compression="jpegxl"), "TIFF compression JPEGXL isn't read"),
    ],
)
def test_what_no_setting_reads_is_named(data, text):
    with pytest.raises(SampleError, match=text):
        decode_deep(data, GREY16)


def test_values_that_are_not_finite_are_named():
    pixels = values((4, 5, 2), "float32")
    pixels[0, 0, 0], pixels[1, 1, 1] = np.nan, np.inf
    for data in (npy(pixels), tiff(pixels)):
        with pytest.raises(SampleError, match="2 of its values are infinite or no number") as error:
            read(data, 2, "float32")
        assert error.value.kind == "not finite"


def test_white_is_zero_is_inverted_and_orientation_is_applied():
    np.testing.assert_array_equal(read(tiff(DEEP, photometric="miniswhite"), 1, "uint16"), 65535 - DEEP)
    turned = tiff(values((4, 6, 13), "uint16"), extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_array_equal(read(turned, 13, "uint16"), values((4, 6, 13), "uint16"))
    np.testing.assert_array_equal(read(turned, 13, "uint16", "apply"), np.rot90(values((4, 6, 13), "uint16"), -1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey = saved(Image.fromarray(GREY8[..., 0]), exif=exif)
    np.testing.assert_array_equal(read(grey, 1, "uint8", "apply"), np.rot90(GREY8, -1))
    np.testing.assert_array_equal(read(grey, 1, "uint8"), GREY8)


@pytest.mark.parametrize("compression", ["raw", "group4", "tiff_lzw"])
def test_single_bits_of_tiff_are_black_and_white(compression):
    image = Image.fromarray(GREY8[..., 0] > 127)
    found = read(saved(image, "TIFF", compression=compression), 1, "uint8")
    np.testing.assert_array_equal(found[..., 0], np.asarray(image.convert("L")))


def test_pages_of_one_size_are_bands_and_others_are_left():
    bands = values((12, 14, 5), "uint16")
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for band in np.moveaxis(bands, -1, 0):
            writer.write(band, contiguous=False, metadata=None)
        writer.write(bands[::2, ::2, 0], metadata=None, subfiletype=1)
    np.testing.assert_array_equal(read(stream.getvalue(), 5, "uint16"), bands)


def test_tiff_that_would_take_too_much_is_refused(monkeypatch):
    many = tiff(values((8, 8, 5), "uint16"), "pages")
    monkeypatch.setattr(tiff_decode, "_MAX_PAGES", 4)
    with pytest.raises(SampleError, match="it has 5 pages; give up to 4"):
        read(many, 5, "uint16")
    stream = io.BytesIO()
    tifffile.imwrite(stream, values((16, 16, 16), "uint16"), photometric="minisblack", volumetric=True, tile=(16,) * 3)
    volume = stream.getvalue()
    with pytest.raises(SampleError, match="its pixels have a depth of 16; save them as bands"):
        read(volume, 16, "uint16")
    monkeypatch.setattr(tiff_decode, "MAX_BYTES", 1000)
    with pytest.raises(SampleError, match="its tiles take over 1000 bytes each; write smaller ones"):
        read(tiff(values((32, 32, 1), "uint16"), tile=(32, 32)), 1, "uint16")
    monkeypatch.setattr(pixel_format, "MAX_BYTES", 1000)
    with pytest.raises(SampleError, match="13 channels of uint16: 6656 bytes decoded; give up to 1000, or cut it into"):
        read(npy(values((16, 16, 13), "uint16")), 13, "uint16")


def test_compressed_tiff_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tiff_decode.importlib.util, "find_spec", lambda name: None)
    np.testing.assert_array_equal(read(tiff(DEEP), 1, "uint16"), DEEP)
    with pytest.raises(
        DataError, match=r"ADOBE_DEFLATE, and imagecodecs isn't installed; pip install 'ijepa_scale\[tiff\]'"
    ):
        read(tiff(DEEP, compression="zlib"), 1, "uint16")


def test_dicom_without_its_package_says_what_to_install():
    code = (
        "import sys; sys.modules['pydicom'] = None\n"
        "from ijepa_scale.config.pixels import PixelFormat\n"
        "from ijepa_scale.data.deep_decode import decode_deep\n"
        "decode_deep(bytes(128) + b'DICM', PixelFormat(1, 'uint16'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError: DICOM needs pydicom" in found.stderr and "pip install 'ijepa_scale[dicom]'" in found.stderr


def huge_npy() -> bytes:
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (8000000, 8), }"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header + b"\n"


def bomb() -> bytes:
    """A TIFF of 4 x 4 pixels whose strip inflates to 1 GiB."""
    small = bytearray(tiff(values((4, 4, 1), "uint16"), compression="zlib"))
    deflated = zlib.compressobj(9)
    strip = b"".join(deflated.compress(bytes(1 << 24)) for _ in range(64)) + deflated.flush()
    with tifffile.TiffFile(io.BytesIO(bytes(small))) as file:
        page = file.pages.first
        offsets, counts = page.tags[273].valueoffset, page.tags[279].valueoffset
    for place, value in ((offsets, len(small)), (counts, len(strip))):
        small[place : place + 4] = struct.pack("<I", value)
    return bytes(small) + strip


def wide_png() -> bytes:
    data = bytearray(png(values((4, 4, 4), "uint16")))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [(huge_npy(), PixelFormat(8, "uint16")), (bomb(), GREY16), (wide_png(), PixelFormat(4, "uint16")),
     (b"\x93NUMPY\1\0\xff\xff" + b" " * 65535, GREY16)],
    ids=["npy", "deflate", "png", "header"],
)  # fmt: skip
def test_memory_is_bounded_by_what_the_file_holds(data, wanted):
    tracemalloc.start()
    try:
        with pytest.raises(SampleError):
            decode_deep(data, wanted)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


SEEDS = [
    (tiff(values((9, 11, 13), "uint16"), layout, **options), BANDS)
    for layout in ("contig", "separate", "pages")
    for options in ({}, {"compression": "zlib"}, {"compression": "lzw", "tile": (16, 16)}, {"compression": "zstd"})
] + [
    (tiff(values((9, 11, 3), "uint8"), photometric="rgb", compression="jpeg"), PixelFormat(3, "uint16")),
    (tiff(values((9, 11, 1), "uint16"), compression="jpeg2000"), GREY16),
    (npy(values((9, 11, 13), "uint16")), BANDS),
    (png(DEEP), GREY16), (png(np.repeat(DEEP, 4, 2)), PixelFormat(4, "uint16")),
    (dicom(values((9, 11), "uint16")), GREY16),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(data=st.data(), seed=st.sampled_from(range(len(SEEDS))))
def test_damaged_bytes_are_bad_samples(data, seed):
    content, wanted = SEEDS[seed]
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)) | st.integers(0, min(400, len(changed))))
        kind = data.draw(st.sampled_from(["set", "cut", "drop", "put"]))
        if kind == "set":
            changed[at : at + 4] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + data.draw(st.integers(1, 40))]
        else:
            changed[at:at] = data.draw(st.sampled_from([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 9, b"II*\0"]))
    tracemalloc.start()
    try:
        pixels = decode_deep(bytes(changed), wanted)
        assert pixels.dtype == wanted.dtype and pixels.shape[2] == wanted.channels
    except SampleError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 600 << 20


def antialiased(line: np.ndarray, size: int, cubic: bool) -> np.ndarray:
    """Returns a (size, N) float64 matrix product of PIL's antialiased filter with `line` (N, ...), for comparison."""
    count = len(line)
    scale = count / size
    stretch = max(scale, 1.0)
    distance = np.abs((np.arange(count) + 0.5)[None] - (np.arange(size)[:, None] + 0.5) * scale) / stretch
    if cubic:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    else:
        weights = np.maximum(0, 1 - distance)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.tensordot(weights, line, axes=1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_on_the_host_follow_a_float_reference(dtype, interpolation):
    pixels = values((50, 70, 5), dtype)
    box, output = (3, 5, 41, 60), (13, 17)
    crop = pixels[3:44, 5:65].astype(np.float64)
    expected = np.moveaxis(antialiased(np.moveaxis(antialiased(crop, 13, interpolation == "bicubic"), 1, 0), 17,
                                       interpolation == "bicubic"), 0, 1)  # fmt: skip
    found = crop_deep(pixels, box, output, interpolation)
    assert found.dtype == pixels.dtype and found.shape == (13, 17, 5)
    range_ = 1.0 if dtype == "float32" else float(np.iinfo(dtype).max)
    if dtype != "float32":
        expected = expected.clip(0, range_)
    assert np.abs(found - expected).max() <= {"uint8": 1.5 / 255, "uint16": 1 / 65535, "float32": 1e-5}[dtype] * range_
    small = crop_deep(pixels, (0, 0, 20, 20), output, interpolation)
    np.testing.assert_array_equal(small, pixels[:20, :20])


def test_centre_crops_of_any_format():
    for dtype in TYPES:
        pixels = values((40, 60, 5), dtype)
        found = center_crop(pixels, (14, 14), 0.875)
        whole = resize_deep(pixels, (16, 24), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, whole[1:15, 5:19])
    rgb = values((40, 60, 3), "uint8")
    np.testing.assert_array_equal(
        resize_deep(rgb, (16, 24), Image.Resampling.BICUBIC),
        np.asarray(Image.fromarray(rgb).resize((24, 16), Image.Resampling.BICUBIC)),
    )

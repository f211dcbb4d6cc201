"""Every row of the tables of pixels in docs/data.md, and EXIF orientation with every reader."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

from ijepa_scale import rng
from ijepa_scale.config.data import AugmentConfig, DataConfig
from ijepa_scale.data.decode import CROP_DRAWS, PixelRules, choose_box, decode, decode_crop
from ijepa_scale.data.eval_reader import EvalReader, center_crop
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.pil_decode import orientation_of, turn
from ijepa_scale.data.shards.make import prepare_image
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.open import training_order, training_source
from ijepa_scale.errors import SampleError

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
RGB = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = np.random.default_rng(1).integers(0, 65536, (16, 24, 3)).astype(np.uint16)
ALPHA = Image.fromarray(RGB[..., 1])


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def torchvisions(data):
    """Returns the pixels of torchvision.datasets.folder.pil_loader."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def with_alpha(image):
    copy = image.copy()
    copy.putalpha(ALPHA)
    return copy


def palette():
    return Image.fromarray(RGB).quantize(16)


def png16(pixels):
    """Returns (h, w, 3) uint16 as PNG, which PIL can't write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(pixels):
    """Returns (h, w, 3) uint16 as TIFF."""
    height, width, _ = pixels.shape
    data = pixels.astype("<u2").tobytes()
    after = 8 + 2 + 12 * 9 + 4
    tags = [(256, 3, width), (257, 3, height), (258, 0, after), (259, 3, 1), (262, 3, 2), (273, 4, after + 6)]
    tags += [(277, 3, 3), (278, 3, height), (279, 4, len(data))]
    entries = b"".join(
        struct.pack("<HHIHH", tag, 3, 1, value, 0) if kind == 3
        else struct.pack("<HHII", tag, kind or 3, 1 if kind else 3, value) for tag, kind, value in tags
    )  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<HHH", 16, 16, 16) + data


def frames(format, **options):
    colours = [Image.fromarray(np.roll(RGB, 7 * number, axis=1)) for number in range(3)]
    data = encoded(colours[0], format, save_all=True, append_images=colours[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    return data


def check_grey():
    for image in (Image.fromarray(GREY), Image.fromarray(GREY > 99)):
        for data in (encoded(image), encoded(image, "TIFF"), encoded(image.convert("L"), "JPEG")):
            np.testing.assert_array_equal(decode(data), torchvisions(data))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(GREY))), np.repeat(GREY[..., None], 3, axis=2))


def check_grey_alpha():
    data = encoded(with_alpha(Image.fromarray(GREY)))
    assert Image.open(io.BytesIO(data)).mode == "LA"
    np.testing.assert_array_equal(decode(data), np.repeat(GREY[..., None], 3, axis=2))


def check_rgba():
    for data in (encoded(with_alpha(Image.fromarray(RGB))), encoded(with_alpha(Image.fromarray(RGB)), "TIFF")):
        assert Image.open(io.BytesIO(data)).mode == "RGBA"
        np.testing.assert_array_equal(decode(data), RGB)


def check_cmyk():
    data = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    np.testing.assert_array_equal(decode(data), torchvisions(data))
    assert np.abs(decode(data).astype(int) - RGB).mean() < 30  # not inverted


def check_palette():
    for format in ("PNG", "GIF", "TIFF", "BMP"):
        data = encoded(palette(), format)
        assert Image.open(io.BytesIO(data)).mode == "P"
        np.testing.assert_array_equal(decode(data), np.asarray(palette().convert("RGB")))


def check_palette_with_transparency(recwarn):
    for transparency in (3, bytes([0, 128] * 8)):
        data = encoded(palette(), transparency=transparency)
        assert "transparency" in Image.open(io.BytesIO(data)).info
        np.testing.assert_array_equal(decode(data), np.asarray(palette().convert("RGB")))
    assert not len(recwarn)


def check_deep_grey():
    for format in ("PNG", "TIFF", "PPM", "JPEG2000"):
        data = encoded(Image.fromarray(DEEP[..., 0]), format)
        np.testing.assert_array_equal(decode(data), np.repeat((DEEP[..., :1] >> 8).astype(np.uint8), 3, axis=2))
    assert (torchvisions(encoded(Image.fromarray(DEEP[..., 0]), "PPM")) == 255).mean() > 0.9  # what PIL would give


def check_deep_colour():
    for data in (png16(DEEP), tiff16(DEEP)):
        np.testing.assert_array_equal(decode(data), (DEEP >> 8).astype(np.uint8))
        np.testing.assert_array_equal(decode(data), torchvisions(data))


def check_integers():
    with pytest.raises(SampleError, match="pixels are 32-bit integers of unknown range; save it with 8 or 16") as found:
        decode(encoded(Image.fromarray(DEEP[..., 0].astype(np.int32)), "TIFF"))
    assert found.value.kind == "pixel range"


def check_floats():
    pfm = b"Pf\n2 2\n-1.0\n" + np.ones(4, "<f4").tobytes()
    for data in (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), pfm):
        with pytest.raises(SampleError, match="pixels are floating-point numbers of unknown range; save") as found:
            decode(data)
        assert found.value.kind == "pixel range"


def check_animated():
    for data in (frames("PNG"), frames("WEBP", lossless=True)):
        np.testing.assert_array_equal(decode(data), RGB)
    for data in (frames("GIF"), frames("AVIF", quality=100, subsampling="4:4:4")):
        np.testing.assert_array_equal(decode(data), torchvisions(data))
        first, second = (np.abs(decode(data).astype(int) - np.roll(RGB, shift, 1)).mean() for shift in (0, 7))
        assert 2 * first < second


def check_pages():
    np.testing.assert_array_equal(decode(frames("TIFF")), RGB)
    mpo = frames("MPO", quality=100, subsampling=0)
    np.testing.assert_array_equal(decode(mpo), torchvisions(mpo))
    assert np.abs(decode(mpo).astype(int) - RGB).mean() < 3


def check_orientation():
    for orientation in range(1, 9):
        for format in ("JPEG", "PNG", "WEBP", "AVIF"):
            data = turned(orientation, format)
            np.testing.assert_array_equal(decode(data), torchvisions(data))
        data = turned(orientation, "TIFF")
        np.testing.assert_array_equal(decode(data), decode(data, "apply"))
        np.testing.assert_array_equal(decode(data), turn(RGB, orientation))


def check_profile():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(RGB), icc_profile=profile)), RGB)


CHECKS = {
    "grey, black and white": check_grey,
    "grey with alpha": check_grey_alpha,
    "RGBA": check_rgba,
    "CMYK JPEG": check_cmyk,
    "palette": check_palette,
    "palette with transparency": check_palette_with_transparency,
    "16-bit grey": check_deep_grey,
    "16-bit colour": check_deep_colour,
    "32-bit integers": check_integers,
    "floating point": check_floats,
    "animated GIF, PNG, WebP, AVIF": check_animated,
    "several pages or images (TIFF, MPO)": check_pages,
    "EXIF orientation": check_orientation,
    "colour profile (ICC)": check_profile,
}


def test_the_table_in_the_docs_has_these_rows():
    table = DOCS.read_text().split("| file | how it is read |\n|---|---|\n")[1].split("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()] == list(CHECKS)


@pytest.mark.parametrize("row", CHECKS)
def test_row_of_the_table(row, recwarn):
    check = CHECKS[row]
    check(recwarn) if "recwarn" in check.__code__.co_varnames else check()


def turned(orientation, format="JPEG", image=None, **options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options |= {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(format, {})
    return encoded(image or Image.fromarray(RGB), format, exif=exif, **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_in_pil(format, orientation):
    data = turned(orientation, format)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(decode(data, "apply"), seen)
    for sample in range(5):
        draws = rng.uniform(0, "test", 0, np.array([sample]), CROP_DRAWS)[0].tolist()
        top, left, h, w = choose_box(*seen.shape[:2], draws, SCALE, RATIO)
        crop = decode_crop(data, draws, (64, 64), scale=SCALE, ratio=RATIO, rules=PixelRules("apply"))
        np.testing.assert_array_equal(crop, seen[top : top + h, left : left + w])


def test_orientation_in_xmp_counts_as_in_pil():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.fromarray(RGB), "JPEG", xmp=xmp)
    assert orientation_of(data) == 6
    np.testing.assert_array_equal(decode(data, "apply"), np.rot90(decode(data), -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40])
def test_damaged_exif_counts_as_none(exif):
    data = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    np.testing.assert_array_equal(decode(data, "apply"), decode(data))


def test_an_orientation_that_does_not_exist_counts_as_none():
    data = turned(9)
    assert orientation_of(data) == 1
    np.testing.assert_array_equal(decode(data, "apply"), decode(data))


@pytest.mark.parametrize("reader", ["shards", "imagefolder", "stream"])
def test_every_reader_turns_images_if_told_to(tmp_path, reader):
    data = turned(6, "PNG")
    if reader == "imagefolder":
        for name in "ab":
            (tmp_path / "set" / name).mkdir(parents=True)
            (tmp_path / "set" / name / "1.png").write_bytes(data)
    else:
        write_shards([Sample("a", data, 0), Sample("b", data, 1)], tmp_path / "set")
    shapes = {}
    for exif in ("ignore", "apply"):
        config = DataConfig(reader=reader, train=str(tmp_path / "set"), batch_size=2, workers=0, exif=exif)
        source = training_source(config, (8, 8))
        order = training_order(config, source, 2, seed=0, steps_per_epoch=1)
        loader = TrainLoader(
            source, order, AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.5, 2.0)), (16, 16), seed=0, stop_step=4,
            rules=PixelRules(config.exif, config.decode_scaling),
        )  # fmt: skip
        shapes[exif] = {tuple(size) for batch in loader for size in batch.sizes.tolist()}
    assert max(width for _, width in shapes["ignore"]) > 16 >= max(height for height, _ in shapes["ignore"])
    assert max(height for height, _ in shapes["apply"]) > 16 >= max(width for _, width in shapes["apply"])


def test_evaluation_turns_images_if_told_to(tmp_path):
    data = turned(6, "PNG")
    source = training_source(
        DataConfig(train=str(write_shards([Sample("a", data, 0)], tmp_path)[0]), batch_size=1), (8, 8)
    )
    for exif in ("ignore", "apply"):
        options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_fraction": 1.0}
        images = next(iter(EvalReader(source, (8, 8), ids=[0], exif=exif, **options))).images[0]
        expected = torch.from_numpy(center_crop(decode(data, exif), (8, 8), 1.0).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(images, expected)


def test_shards_keep_the_orientation_of_images_that_are_encoded_anew():
    large = turned(6, image=Image.fromarray(RGB).resize((240, 160)))
    small = prepare_image(large, 40)
    assert orientation_of(small) == 6 and decode(small).shape == (40, 60, 3)
    assert decode(small, "apply").shape == (60, 40, 3)
    stored = prepare_image(turned(6, "AVIF"), None)
    assert stored.startswith(b"\x89PNG") and orientation_of(stored) == 6
    assert orientation_of(prepare_image(turned(6, "TIFF"), None)) == 1  # already turned

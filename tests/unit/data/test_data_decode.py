"""Decoding and cropping single images."""

import io
import math

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torchvision.transforms import RandomResizedCrop

from ijepa_kernels.crop_resize import crop_resize
from ijepa_scale import rng
from ijepa_scale.data.decode import CROP_DRAWS, PixelRules, choose_box, decode, decode_crop, largest_crop
from ijepa_scale.errors import DataError

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)


def picture(height=90, width=130, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def draws_of(sample):
    return rng.uniform(0, "test", 0, np.array([sample]), CROP_DRAWS)[0].tolist()


class _Replay:
    """Makes torch's random calls in RandomResizedCrop.get_params return our draws."""

    def __init__(self, draws, monkeypatch):
        self.sizes, self.corners = iter(draws[:-2]), iter(draws[-2:])
        monkeypatch.setattr(torch.Tensor, "uniform_", self.uniform)
        monkeypatch.setattr(torch, "randint", self.randint)

    def uniform(self, low, high):  # a bound method: the tensor itself is not passed
        return torch.tensor([low + (high - low) * next(self.sizes)], dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor([low + int(next(self.corners) * (high - low))])


@pytest.mark.parametrize("shape", [(300, 400), (28, 28), (1, 1), (500, 40), (30, 900), (7, 5)])
def test_the_box_is_torchvisions(shape, monkeypatch):
    image = torch.zeros(3, *shape)
    for sample in range(50):
        draws = draws_of(sample)
        with monkeypatch.context() as patch:
            _Replay(draws, patch)
            expected = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
        box = choose_box(*shape, draws, SCALE, RATIO)
        # torchvision computes in float32, so rounding may change a size by a pixel, and with it the corner
        assert np.abs(np.array(box) - np.array(expected)).max() <= 1
        assert box[0] + box[2] <= shape[0] and box[1] + box[3] <= shape[1] and min(box[2:]) >= 1


def test_boxes_keep_to_scale_and_ratio():
    boxes = [choose_box(400, 500, draws_of(sample), SCALE, RATIO) for sample in range(500)]
    areas = np.array([h * w / 200_000 for _, _, h, w in boxes])
    ratios = np.array([math.log(w / h) for _, _, h, w in boxes])
    assert areas.min() > 0.29 and areas.max() <= 1.0 and 0.55 < areas.mean() < 0.68
    assert np.abs(ratios).max() < math.log(4 / 3) + 0.02 and abs(ratios.mean()) < 0.05


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_decodes_as_in_pil(mode):
    data = encoded(picture().convert(mode))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "PPM"])
def test_other_formats_go_through_pil(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(picture(), format, **options)), np.asarray(picture()))


def test_png_modes():
    levels = np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16)
    deep = decode(encoded(Image.fromarray(levels), "PNG"))
    np.testing.assert_array_equal(deep, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2))
    for mode in ("L", "P", "RGBA", "1", "LA"):
        assert decode(encoded(picture().convert(mode), "PNG")).shape == (90, 130, 3)


def test_stray_bytes_that_pil_only_warns_of_are_no_error():
    data = encoded(picture())
    stray = data[:-2] + b"\x00" * 5 + data[-2:]
    np.testing.assert_array_equal(decode(stray), decode(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(90, 130), (28, 28), (1, 1), (1, 60)])
def test_a_crop_of_full_size_is_cut_exactly(format, shape):
    data = encoded(picture(*shape), format)
    whole = decode(data)
    for sample in range(10):
        top, left, h, w = choose_box(*shape, draws_of(sample), SCALE, RATIO)
        crop = decode_crop(data, draws_of(sample), (64, 64), scale=SCALE, ratio=RATIO)
        np.testing.assert_array_equal(crop, whole[top : top + h, left : left + w])
        pixels = decode_crop(whole, draws_of(sample), (64, 64), scale=SCALE, ratio=RATIO)
        np.testing.assert_array_equal(pixels, crop)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(400, 333), (1000, 1201)])
def test_large_crops_are_resized_as_in_pil(format, shape, interpolation):
    """What a training image becomes after the device's resize equals torchvision's chain, whatever the crop's size."""
    data = encoded(picture(*shape), format)
    whole = Image.fromarray(decode(data))
    pil = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    for sample in range(6):
        top, left, h, w = choose_box(*shape, draws_of(sample), SCALE, RATIO)
        options = {"scale": SCALE, "ratio": RATIO, "interpolation": interpolation}
        crop = decode_crop(data, draws_of(sample), (24, 32), **options)
        sizes = np.array([crop.shape[:2]])
        flat = torch.from_numpy(crop.reshape(-1).copy())
        ours = crop_resize(flat, sizes, (24, 32), interpolation=interpolation)[0].permute(1, 2, 0)
        expected = whole.crop((left, top, left + w, top + h)).resize((32, 24), pil)
        np.testing.assert_array_equal(ours.numpy(), np.asarray(expected))


@pytest.mark.parametrize("shape", [(400, 333), (1000, 1201)])
def test_large_crops_of_pixels_are_averaged(shape):
    pixels = np.asarray(picture(*shape))
    for sample in range(6):
        top, left, h, w = choose_box(*shape, draws_of(sample), SCALE, RATIO)
        crop = decode_crop(pixels, draws_of(sample), (24, 24), scale=SCALE, ratio=RATIO)
        factor = 2 ** int(math.log2(min(h, w) / 24))
        assert crop.shape[:2] == (round(h / factor), round(w / factor))
        rows, columns = (slice(round(b / factor) * factor, (round(b / factor) + n) * factor) for b, n in zip(
            (top, left), crop.shape[:2], strict=True))  # fmt: skip
        blocks = Image.fromarray(pixels[rows, columns]).reduce(factor)
        np.testing.assert_array_equal(crop, np.asarray(blocks))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("shape", [(400, 333), (1000, 1201)])
def test_dct_scaling_looks_the_same(shape, orientation, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(picture(*shape), exif=exif)
    asked = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: asked.append(k["min_factor"]) or real(*a, **k))
    for sample in range(6):
        seen = shape if orientation == 1 else shape[::-1]
        _, _, h, w = choose_box(*seen, draws_of(sample), SCALE, RATIO)
        ours, exact = (
            decode_crop(data, draws_of(sample), (24, 24), scale=SCALE, ratio=RATIO, rules=PixelRules("apply", scaling))
            for scaling in ("dct", "none")
        )
        assert asked[-2] == min(8, 2 ** int(math.log2(min(h, w) / 24))) > 1 == asked[-1]
        assert 24 * asked[-2] <= min(h, w)  # never below the size that the crop needs
        assert ours.shape == exact.shape == (24, 24, 3)
        assert 0 < np.abs(ours.astype(int) - exact).mean() < 1.5


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\xff\xd8\xff", encoded(picture())[:2000], encoded(picture(), "PNG")[:2000]]
)
def test_damaged_images_are_refused(data):
    for read in (decode, lambda d: decode_crop(d, draws_of(0), (8, 8), scale=SCALE, ratio=RATIO)):
        with pytest.raises(DataError, match="not (an image|a decodable image) .*; replace or drop it"):
            read(data)


def test_no_damage_raises_anything_else():
    generator = np.random.default_rng(0)
    refused = 0
    for data in (encoded(picture(20, 24)), encoded(picture(20, 24), "PNG"), encoded(picture(20, 24), "WEBP")):
        for _ in range(60):
            damaged = bytearray(data)
            for offset in generator.integers(0, min(len(data), 300), 4):
                damaged[offset] = generator.integers(0, 256)
            try:
                decode_crop(bytes(damaged), draws_of(0), (8, 8), scale=SCALE, ratio=RATIO)
            except DataError:
                refused += 1
    assert refused > 30


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pixels_are_counted_before_decoding(format, monkeypatch):
    monkeypatch.setattr("ijepa_scale.data.pil_decode.MAX_PIXELS", 90 * 130 - 1)
    with pytest.raises(DataError, match="image of 130 x 90 pixels; give 1 to 11699 pixels"):
        decode_crop(encoded(picture(), format), draws_of(0), (8, 8), scale=SCALE, ratio=RATIO)
    with pytest.raises(DataError, match="image of 130 x 90 pixels"):
        decode(encoded(picture(), format))


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.3, 5.0)]),
    st.integers(0, 1000),
    st.sampled_from(["pixels", "none", "dct"]),
)
def test_no_crop_is_larger_than_said(shape, output, ratio, sample, kind):
    pixels = np.zeros((*shape, 3), np.uint8)
    data = pixels if kind == "pixels" else encoded(Image.fromarray(pixels))
    rules = PixelRules(decode_scaling="dct" if kind == "dct" else "none")
    crop = decode_crop(data, draws_of(sample), output, scale=(0.05, 1.0), ratio=ratio, rules=rules)
    assert 0 < crop.shape[0] * crop.shape[1] <= largest_crop(output, ratio)

"""Operations on 8-bit images against PIL's, image by image."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from ijepa_scale.augment import geometry, levels
from ijepa_scale.augment.rand_augment import rotation, shear, translation

FILL = (124, 116, 104)
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def made_up() -> list[Image.Image]:
    """Returns smooth, noisy and flat pictures, one with a single bright pixel, of 33 x 40 pixels."""
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
            (40, 33), Image.Resampling.BICUBIC
        )
        for _ in range(6)
    ]
    noise = generator.integers(0, 256, (33, 40, 3), dtype=np.uint8)
    flat = np.full((33, 40, 3), 77, dtype=np.uint8)
    spot = flat.copy()
    spot[3, 4] = 255
    dark = (noise // 8 + 30).astype(np.uint8)
    return [*pictures, *(Image.fromarray(array) for array in (noise, flat, spot, dark))]


@pytest.fixture(scope="module", params=["made up", "photos"])
def pictures(request) -> list[Image.Image]:
    if request.param == "made up":
        return made_up()
    with tarfile.open(request.getfixturevalue("clothing_tar")) as tar:
        names = [member for member in tar if member.name.endswith(".jpg")][::80]
        found = [Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in names]
    return [image.resize((96, 80)) for image in found]


def stack(pictures) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def difference(found: torch.Tensor, expected: list[Image.Image]) -> torch.Tensor:
    return (found.int() - stack(expected).int()).abs()


def test_luma_is_pils(pictures):
    expected = [picture.convert("L").convert("RGB") for picture in pictures]
    assert difference(levels.luma(stack(pictures)).expand(-1, 3, -1, -1), expected).max() == 0


@pytest.mark.parametrize(
    ("name", "exact"),
    [("Color", 0), ("Contrast", 0), ("Brightness", 0), ("Sharpness", 0)],
)
def test_enhancements_are_pils(pictures, name, exact):
    factors = torch.linspace(0.1, 1.9, len(pictures))
    found = getattr(levels, name.lower())(stack(pictures), factors)
    expected = [getattr(ImageEnhance, name)(p).enhance(float(f)) for p, f in zip(pictures, factors, strict=True)]
    assert difference(found, expected).max() <= exact
    assert difference(found, pictures).float().mean() > 1  # it does something


@pytest.mark.parametrize(("name", "most"), [("autocontrast", 1), ("equalize", 0), ("invert", 0)])
def test_operations_without_parameter_are_pils(pictures, name, most):
    found = getattr(levels, name)(stack(pictures))
    apart = difference(found, [getattr(ImageOps, name)(picture) for picture in pictures])
    assert apart.max() <= most and apart.float().mean() < 0.01


def test_posterize_and_solarize_are_pils(pictures):
    bits = torch.arange(len(pictures)) % 8 + 1
    expected = [ImageOps.posterize(picture, int(b)) for picture, b in zip(pictures, bits, strict=True)]
    assert difference(levels.posterize(stack(pictures), bits), expected).max() == 0
    assert levels.posterize(stack(pictures), torch.zeros_like(bits)).max() == 0
    thresholds = torch.linspace(0, 256, len(pictures)).long()
    expected = [ImageOps.solarize(picture, int(t)) for picture, t in zip(pictures, thresholds, strict=True)]
    assert difference(levels.solarize(stack(pictures), thresholds), expected).max() == 0


def test_solarize_add_is_a_table(pictures):
    adds = torch.linspace(0, 128, len(pictures)).long()
    tables = [[min(255, i + int(add)) if i < 128 else i for i in range(256)] * 3 for add in adds]
    expected = [picture.point(table) for picture, table in zip(pictures, tables, strict=True)]
    assert difference(levels.solarize_add(stack(pictures), adds), expected).max() == 0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("distances", [shear, translation])
def test_shears_and_shifts_are_pils(pictures, distances, down, interpolation):
    """By whole and broken numbers of pixels and past the edge, as rows are moved and as any matrix is."""
    images, fill = stack(pictures), torch.tensor(FILL, dtype=torch.uint8)
    width, height = pictures[0].size
    lines, length = (width, height) if down else (height, width)
    values = np.linspace(-10, 10, len(pictures))
    if distances is translation:
        values[:3] = np.array([3.0, -0.5, 1.2 * length]) / (0.45 * length) * 10
    shifts = shear(values, lines) if distances is shear else translation(values, lines, length=length)
    slope = shifts[:, 1] - shifts[:, 0]
    matrices = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(pictures), 1))
    matrices[:, 3 if down else 1], matrices[:, 5 if down else 2] = slope, shifts[:, 0] - slope / 2
    turned = images.transpose(2, 3) if down else images
    slid = geometry.slide(turned, shifts, fill, interpolation=interpolation)
    moved = geometry.affine(images, torch.from_numpy(matrices), fill, interpolation=interpolation)
    expected = [
        picture.transform(
            picture.size, Image.Transform.AFFINE, tuple(m), resample=RESAMPLING[interpolation], fillcolor=FILL
        )
        for picture, m in zip(pictures, matrices, strict=True)
    ]
    for found in (slid.transpose(2, 3) if down else slid, moved):
        apart = difference(found, expected)
        assert apart.max() <= 1 and apart.float().mean() < 0.1
        assert difference(found, pictures).float().mean() > 3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_rotation_is_pils(pictures, interpolation):
    width, height = pictures[0].size
    magnitudes = np.linspace(-9.7, 9.3, len(pictures))
    matrices = torch.from_numpy(rotation(magnitudes, (height, width)))
    fill = torch.tensor(FILL, dtype=torch.uint8)
    found = geometry.affine(stack(pictures), matrices, fill, interpolation=interpolation)
    expected = [
        picture.rotate(float(m) / 10 * 30, resample=RESAMPLING[interpolation], fillcolor=FILL)
        for picture, m in zip(pictures, magnitudes, strict=True)
    ]
    apart = difference(found, expected)
    assert apart.max() <= 1 and apart.float().mean() < 0.1


def test_small_images_keep_their_border():
    tiny = torch.randint(0, 256, (2, 3, 2, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(levels.sharpness(tiny, torch.tensor([0.1, 1.9])), tiny)

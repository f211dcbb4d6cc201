"""Photographs are paired with their maps, and each mistake in the data is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.dense.map_folders import MapFolder, check_maps, read_maps, training_maps

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def photograph(path: Path, *, width: int = 12, height: int = 8, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


def mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def pairs(root: Path, count: int = 5) -> Path:
    for number in range(count):
        photograph(root / "images" / f"{number}.jpg")
        values = np.zeros((8, 12))
        values[:, number:], values[0, 0] = 2, 255
        mask(root / "masks" / f"{number}.png", values)
    return root


def opened(root: Path | str, kind: str = "masks", **options: object) -> MapFolder:
    return MapFolder(str(root), kind, image_size=(4, 4), **options)  # type: ignore[arg-type]


def checked(source: MapFolder) -> str:
    with pytest.raises(DataError) as error:
        check_maps(source, "train", world=ALONE)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pairs_are_read_in_order(tmp_path):
    source = opened(pairs(tmp_path))
    found = check_maps(source, "train", world=ALONE)
    assert (source.num_samples, found.classes, found.turned) == (5, [0, 2], 0)
    assert source.read(3).shape == (4, 4, 3)
    maps = list(read_maps(source))
    assert [int((each == 2).sum()) for each in maps] == [8 * (12 - n) - (n == 0) for n in range(5)]
    small = training_maps(source, tmp_path / "cache" / "maps.npy")
    assert small.shape == (5, 4, 4) and isinstance(small, np.memmap)
    assert np.array_equal(small, [each[1::2, 1::3] for each in maps])  # the pixels at the centres
    (tmp_path / "cache" / "cut.npy").write_bytes((tmp_path / "cache" / "maps.npy").read_bytes()[:150])
    assert np.array_equal(training_maps(source, tmp_path / "cache" / "cut.npy"), small)


def test_worker_processes_read_the_same(tmp_path):
    source = opened(pairs(tmp_path, 19))
    for one, other in zip(read_maps(source, workers=2), read_maps(source), strict=True):
        assert np.array_equal(one, other)


def test_depth_maps_are_read(tmp_path):
    for number in range(3):
        photograph(tmp_path / "images" / f"{number}.png")
        (tmp_path / "depth").mkdir(exist_ok=True)
        np.save(tmp_path / "depth" / f"{number}.npy", np.full((8, 12), 1.0 + number, dtype=np.float32))
    found = check_maps(opened(tmp_path, "depth"), "train", world=ALONE)
    assert (found.lowest, found.highest) == (1.0, 3.0)


def test_ade20k_has_its_own_folders_and_0_is_no_class(tmp_path):
    photograph(tmp_path / "images" / "training" / "a.jpg")
    mask(tmp_path / "annotations" / "training" / "a.png", np.tile(np.arange(12) % 4, (8, 1)))
    source = opened(tmp_path / "images" / "training")
    assert np.array_equal(source.read_map(0)[0, :5], [255, 0, 1, 2, 255])
    source.num_classes = 2
    assert "class 3, but there are 2 (1 to 2)" in checked(source)


def test_voc_has_lists(tmp_path):
    for name in "abc":
        photograph(tmp_path / "JPEGImages" / f"{name}.jpg")
        mask(tmp_path / "SegmentationClass" / f"{name}.png", np.full((8, 12), ord(name) - ord("a")))
    listed = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("c\na\n")
    source = opened(listed)
    assert [int(each[0, 0]) for each in read_maps(source)] == [2, 0]
    listed.write_text("a\nd\n")
    with pytest.raises(DataError, match="1 of 2 photographs have no photograph of their name in .*JPEGImages"):
        opened(listed)
    listed.write_text("\n")
    with pytest.raises(DataError, match="names none"):
        opened(listed)


def test_class_names_are_read(tmp_path):
    (pairs(tmp_path) / "classes.json").write_text(json.dumps(["sky", "sea"]))
    source = opened(tmp_path)
    assert source.classes == ["sky", "sea"]
    assert "0.png (class 2, but there are 2 (0 to 1); fix it, or give the number with --classes)" in checked(source)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda root: mask(root / "masks" / "1.png", np.zeros((12, 8))),
            "1.png (8 x 12 pixels, its photograph 12 x 8;",
        ),
        (
            lambda root: photograph(root / "images" / "1.jpg", orientation=6),
            "EXIF orientation 6 turns it; turn the mask",
        ),
        (lambda root: mask(root / "masks" / "1.png", np.zeros((8, 12, 3))), "1.png (a mask of colours"),
        (lambda root: mask(root / "masks" / "1.png", np.full((8, 12), 255)), "no pixel of it has a value"),
        (lambda root: (root / "masks" / "1.png").write_bytes(b"x"), "1.png (not a PNG"),
        (lambda root: (root / "images" / "1.jpg").write_bytes(b"x"), "1.jpg (not an image of a known format"),
    ],
)
def test_each_bad_pair_is_named_with_its_reason(tmp_path, break_it, said):
    break_it(pairs(tmp_path))
    line = checked(opened(tmp_path))
    assert "train: 1 of 5 pairs can't be used" in line and said in line, line


def test_many_bad_pairs_are_counted(tmp_path):
    pairs(tmp_path, 8)
    for number in range(7):
        mask(tmp_path / "masks" / f"{number}.png", np.zeros((2, 2)))
    assert "7 of 8 pairs" in checked(opened(tmp_path)) and "; and 2 more" in checked(opened(tmp_path))


def test_a_turned_photograph_fits_a_turned_mask(tmp_path):
    photograph(tmp_path / "images" / "a.jpg", orientation=6)
    mask(tmp_path / "masks" / "a.png", np.zeros((12, 8)))
    source = MapFolder(str(tmp_path), "masks", image_size=(12, 8))
    assert check_maps(source, "train", world=ALONE).turned == 1
    stored = np.asarray(Image.open(tmp_path / "images" / "a.jpg"))
    assert np.abs(source.read(0).astype(int) - np.rot90(stored, -1)).max() <= 2  # decoders round differently


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "masks" / "1.png").unlink(), "1 of 5 photographs have no mask of their name in .*no 1,"),
        (lambda root: photograph(root / "images" / "1.png"), "1.jpg and .*1.png differ by their suffixes only"),
        (lambda root: (root / "masks").rename(root / "labels"), "has no folder masks; give a folder with images and"),
        (lambda root: (root / "images").rename(root / "photos"), "has no folder images; give a folder with images and"),
    ],
)
def test_folders_without_all_pairs_are_refused(tmp_path, change, said):
    change(pairs(tmp_path))
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


def test_masks_without_a_photograph_are_counted(tmp_path):
    (pairs(tmp_path) / "images" / "1.jpg").unlink()
    assert "4 photographs" in opened(tmp_path).summary() and "1 masks have no photograph" in opened(tmp_path).summary()


def test_photographs_that_are_not_read_are_said(tmp_path):
    (pairs(tmp_path) / "images" / "9.heic").write_bytes(b"x")
    assert "not read: 1 x .heic" in opened(tmp_path).summary()


def test_photographs_of_other_formats_are_read_as_the_encoder_takes_them(tmp_path):
    (pairs(tmp_path, 1) / "images" / "0.jpg").unlink()
    values = np.arange(96, dtype=np.uint16).reshape(8, 12) * 600
    Image.fromarray(values).save(tmp_path / "images" / "0.png")
    source = opened(tmp_path, pixels=PixelFormat(1, "uint16"))
    assert check_maps(source, "train", world=ALONE).classes == [2]
    found = source.read(0)
    assert found.shape == (4, 4, 1) and found.dtype == np.uint16 and found.max() > 40_000

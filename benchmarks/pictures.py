"""Photographs for the benchmarks that read files: the user's, or synthetic JPEGs generated for the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.loader import class_folders
from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.make import MakePlan, make_shards

SYNTHETIC = 240  # number of images
SIDES = (400, 533)  # height and width in pixels: the median of the photographs used for the loader benchmark


def folder_of(images: Path | None, scratch: Path) -> Path:
    """Returns a folder of class folders: from `images` (a folder or tar), or with JPEGs generated in `scratch`."""
    if images is not None:
        return class_folders(images, scratch / "images")
    for number in range(SYNTHETIC):
        path = scratch / "images" / f"class{number % 4}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        small = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(SIDES[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += generator.integers(
            -12, 13, pixels.shape, dtype=np.int16
        )  # grain, so that files are as large as photographs
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=75)
    return scratch / "images"


def shards_of(folder: Path, scratch: Path, shard_bytes: int = 4 << 20) -> Path:
    """Writes the images of class folders as tar shards into `scratch` and returns the folder of the shards."""
    made = scratch / "shards"
    make_shards(FolderImages(folder), made, plan=MakePlan(shard_bytes=shard_bytes))
    return made

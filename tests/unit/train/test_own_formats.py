"""What the recipe sees in images: the format that keeps all of their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.train.own_images import choose_settings


def folder(path: Path, kind: str) -> Path:
    path.mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        levels = generator.integers(0, 256, (40, 44, 4), dtype=np.uint8)
        name = str(path / str(number))
        if kind == "palette":
            Image.fromarray(levels[..., :3]).convert("P").save(f"{name}.png")
        elif kind == "cmyk":
            Image.fromarray(levels, mode="CMYK").save(f"{name}.jpg")
        elif kind == "rgba":
            Image.fromarray(levels).save(f"{name}.png")
        elif kind == "grey16":
            Image.fromarray(levels[..., 0].astype(np.uint16) * 257).save(f"{name}.png")
        elif kind == "first":
            np.save(f"{name}.npy", np.moveaxis(levels.astype(np.float32) / 255, -1, 0))
        else:
            tifffile.imwrite(f"{name}.tif", levels[..., : int(kind)], photometric="minisblack", planarconfig="contig")
    return path


@pytest.mark.parametrize(
    ("kind", "channels", "pixels"),
    [
        ("palette", None, None), ("cmyk", None, None), ("rgba", None, None), ("grey16", 1, "uint16"),
        ("first", 4, "float32"), ("2", 2, None), ("4", 4, None),
    ],
)  # fmt: skip
def test_formats_are_seen(tmp_path, kind, channels, pixels):
    given = {"data": {"train": str(folder(tmp_path / "images", kind))}, "folder": str(tmp_path / "run")}
    found = choose_settings(given, Launch(), "cpu")
    assert (found["model"].get("channels"), found["data"].get("pixels")) == (channels, pixels)
    assert found["model"]["image_size"] == 32
    said = [line for line in found["chosen_by_recipe"] if line.startswith(("model.channels", "data.pixels"))]
    assert len(said) == (channels is not None) + (pixels is not None)


def test_one_given_setting_leaves_the_other_to_the_images(tmp_path):
    data = {"train": str(folder(tmp_path / "images", "grey16"))}
    found = choose_settings({"data": data, "model": {"channels": 1}}, Launch(), "cpu")
    assert "channels" not in found["model"] and found["data"]["pixels"] == "uint16"


def test_sizes_of_a_source_do_not_go_with_the_recipe(tmp_path):
    data = {"train": str(folder(tmp_path / "images", "rgba"))}
    with pytest.raises(ConfigError, match="model.init is runs/x, whose sizes .* configs/continue.yaml"):
        choose_settings({"data": data, "model": {"init": "runs/x"}}, Launch(), "cpu")

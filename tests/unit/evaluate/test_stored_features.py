"""Features in files: computed once, continued after an interruption, and never taken for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate import stored_features
from ijepa_scale.evaluate.frozen import ImageTransform, features, pooled
from ijepa_scale.evaluate.stored_features import FeatureStore, ImagesToEncode
from ijepa_scale.models.registry import build_encoder

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
GREY: dict[str, Any] = dict(mean=(0.5,) * 3, std=(0.25,) * 3)


def images(folder: Path, count: int = 30) -> ImagesToEncode:
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return ImagesToEncode(name="train", source=ImageFolderSource(folder))


def small(seed: int = 0) -> tuple[Any, ImageTransform]:
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=8, width=24, depth=4, heads=3, seed=seed)
    return encoder, ImageTransform(encoder, **GREY)


@pytest.mark.parametrize("pool", ["mean", "last4", "tokens"])
def test_rows_are_the_features_of_the_images_in_order(tmp_path, pool):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=4)
    rows = store.features(encoder, transform, found, pool)
    names = [found.source.name(number) for number in range(30)]
    expected = features(encoder, names, pool=pool, transform=transform)
    assert isinstance(rows, np.memmap) and np.allclose(rows, expected, atol=5e-3)  # PIL resizes within a level of ours
    assert [path.suffix for path in (tmp_path / "features").iterdir()] == [".npy"]


def test_a_file_is_read_again_only_for_the_same_weights_images_and_transform(tmp_path, monkeypatch):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=8)
    first = np.array(store.features(encoder, transform, found, "mean"))
    calls = []
    monkeypatch.setattr(stored_features, "pooled", lambda *arguments: calls.append(1) or pooled(*arguments))
    assert np.array_equal(store.features(encoder, transform, found, "mean"), first) and not calls
    other, _ = small(seed=1)
    darker = ImageTransform(encoder, mean=(0.1,) * 3, std=(0.25,) * 3)
    fewer = images(tmp_path / "fewer", 12)
    for changed in ((other, transform, found), (encoder, darker, found), (encoder, transform, fewer)):
        calls.clear()
        store.features(*changed, "mean")
        assert calls


def test_other_images_of_the_same_names_and_other_heads_are_not_taken_for_these(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=8)
    first = np.array(store.features(encoder, transform, found, "mean"))
    for number in (3, 4):  # replaced in place
        path = Path(found.source.name(number))
        Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8)).save(path)
    same = ImagesToEncode(name="train", source=ImageFolderSource(tmp_path / "images"))
    assert same.source.fingerprint == found.source.fingerprint
    second = np.array(store.features(encoder, transform, same, "mean"))
    assert (np.abs(second - first).max(axis=1) > 1e-3).nonzero()[0].tolist() == [3, 4]
    for block in encoder.blocks:
        block.attn.heads = 2
    assert not np.array_equal(store.features(encoder, transform, same, "mean"), second)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    monkeypatch.setattr(stored_features, "_BATCHES_AT_ONCE", 1)
    whole = np.array(FeatureStore(tmp_path / "whole", ALONE, batch_size=4).features(encoder, transform, found, "mean"))
    done: list[int] = []

    def stop(name: str, rows: int, total: int) -> None:
        done.append(rows)
        if rows == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path / "cut", ALONE, batch_size=4, advance=stop).features(encoder, transform, found, "mean")
    assert not list((tmp_path / "cut").glob("*.npy"))
    again: list[int] = []
    store = FeatureStore(tmp_path / "cut", ALONE, batch_size=4, advance=lambda name, rows, total: again.append(rows))
    assert np.array_equal(store.features(encoder, transform, found, "mean"), whole)
    assert done[-1] == again[0] == 16  # no row is computed twice


def test_a_damaged_image_is_found_before_anything_is_computed(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    Path(found.source.name(29)).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train: 1 of 30 images can't be used"):
        FeatureStore(tmp_path / "features", ALONE).features(encoder, transform, found, "mean")
    assert not (tmp_path / "features").exists()


def test_an_encoder_of_few_blocks_has_no_last_four(tmp_path):
    found = images(tmp_path / "images")
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=3)
    with pytest.raises(ConfigError, match="pool is last4 but the encoder has 2 blocks"):
        FeatureStore(tmp_path / "f", ALONE).features(encoder, ImageTransform(encoder, **GREY), found, "last4")


def test_tokens_that_float16_cannot_hold_are_refused(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images", 4), small()
    with torch.no_grad():
        encoder.norm.weight.mul_(1e6)
    with pytest.raises(
        DataError, match="train: tokens have values up to .*, which float16 can't hold; check the weights"
    ):
        FeatureStore(tmp_path / "features", ALONE).features(encoder, transform, found, "tokens")

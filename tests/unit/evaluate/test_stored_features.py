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
from ijepa_scale.evaluate import parts as in_parts
from ijepa_scale.evaluate import stored_features
from ijepa_scale.evaluate.frozen import ImageTransform, Pool, features
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


def mean_of(store: FeatureStore, *given: Any) -> np.ndarray:
    return np.array(store.features(*given, ["mean"])["mean"])


@pytest.mark.parametrize("batch_size", [1, 3, 64])  # 4 parts, 2 parts, 1 part
def test_rows_are_the_features_of_the_images_in_order(tmp_path, batch_size):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=batch_size)
    pools: tuple[Pool, ...] = ("mean", "last4", "tokens")
    rows = store.features(encoder, transform, found, pools)
    names = [found.source.name(number) for number in range(30)]
    for pool in pools:
        expected = features(encoder, names, pool=pool, transform=transform)
        assert isinstance(rows[pool], np.memmap) and rows[pool].shape == expected.shape
        assert np.allclose(rows[pool], expected, atol=1e-2)  # PIL resizes within a level of ours
    assert rows["tokens"].dtype == np.float16 and rows["mean"].dtype == np.float32
    assert {path.suffix for path in (tmp_path / "features").iterdir()} == {".npy"}
    batches = [np.array([3, 1, 4]), np.arange(12, 30), np.array([29])]
    streamed = [each.numpy() for each in store.tokens(encoder, transform, found, batches)]
    for batch, tokens in zip(batches, streamed, strict=True):
        assert np.allclose(tokens, rows["tokens"][batch], atol=2e-3)  # float16


def test_tokens_beyond_float16_are_refused(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    with torch.no_grad():
        encoder.norm.weight.fill_(1e6)
    with pytest.raises(DataError, match=r"tokens of up to \S+ don't fit float16, .* give --token-gb 0"):
        FeatureStore(tmp_path / "f", ALONE).features(encoder, transform, found, ["tokens"])


def test_what_is_there_is_not_computed_again_for_another_pool(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=8)
    store.features(encoder, transform, found, ["mean"])
    (written,) = (tmp_path / "features").iterdir()
    before = written.stat()
    assert set(store.features(encoder, transform, found, ["mean", "tokens"])) == {"mean", "tokens"}
    assert written.stat() == before and len(list((tmp_path / "features").iterdir())) == 2


def test_a_file_is_read_again_only_for_the_same_weights_images_and_transform(tmp_path, monkeypatch):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=8)
    first = mean_of(store, encoder, transform, found)
    calls, real = [], stored_features._encoded
    monkeypatch.setattr(stored_features, "_encoded", lambda *arguments: calls.append(1) or real(*arguments))
    assert np.array_equal(mean_of(store, encoder, transform, found), first) and not calls
    other, _ = small(seed=1)
    darker = ImageTransform(encoder, mean=(0.1,) * 3, std=(0.25,) * 3)
    fewer = images(tmp_path / "fewer", 12)
    for changed in ((other, transform, found), (encoder, darker, found), (encoder, transform, fewer)):
        calls.clear()
        mean_of(store, *changed)
        assert calls


def test_other_images_of_the_same_names_and_other_heads_are_not_taken_for_these(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=8)
    first = mean_of(store, encoder, transform, found)
    for number in (3, 4):  # replaced in place
        path = Path(found.source.name(number))
        Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8)).save(path)
    same = ImagesToEncode(name="train", source=ImageFolderSource(tmp_path / "images"))
    assert same.source.fingerprint == found.source.fingerprint
    second = mean_of(store, encoder, transform, same)
    assert (np.abs(second - first).max(axis=1) > 1e-3).nonzero()[0].tolist() == [3, 4]
    for block in encoder.blocks:
        block.attn.heads = 2
    assert not np.array_equal(mean_of(store, encoder, transform, same), second)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    monkeypatch.setattr(in_parts, "BATCHES", 1)
    whole = mean_of(FeatureStore(tmp_path / "whole", ALONE, batch_size=4), encoder, transform, found)
    done: list[int] = []

    def stop(name: str, rows: int, total: int) -> None:
        done.append(rows)
        if rows == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mean_of(FeatureStore(tmp_path / "cut", ALONE, batch_size=4, advance=stop), encoder, transform, found)
    assert not list((tmp_path / "cut").glob("*.npy"))
    again: list[int] = []
    store = FeatureStore(tmp_path / "cut", ALONE, batch_size=4, advance=lambda name, rows, total: again.append(rows))
    assert np.array_equal(mean_of(store, encoder, transform, found), whole)
    assert done[-1] == 16 and again[-1] == 30 - 12  # the last of 4 batches wasn't written


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_is_computed_again_and_said(tmp_path, monkeypatch, caplog, suffix, kept):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    monkeypatch.setattr(in_parts.Parts, "remove", lambda self: None)
    store = FeatureStore(tmp_path / "features", ALONE, batch_size=1)
    whole = mean_of(store, encoder, transform, found)
    file, *others = sorted((tmp_path / "features").rglob(f"*{suffix}"))
    assert len(others) == (3 if suffix == ".safetensors" else 0)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    if suffix == ".safetensors":
        next((tmp_path / "features").glob("*.npy")).unlink()
    assert np.array_equal(mean_of(store, encoder, transform, found), whole)
    assert f"{file} is damaged" in caplog.text and "; it is recomputed" in caplog.text


def test_a_damaged_image_is_found_before_anything_is_computed(tmp_path):
    found, (encoder, transform) = images(tmp_path / "images"), small()
    Path(found.source.name(29)).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train: 1 of 30 images can't be used"):
        mean_of(FeatureStore(tmp_path / "features", ALONE), encoder, transform, found)
    assert not (tmp_path / "features").exists()


def test_an_encoder_of_few_blocks_has_no_last_four(tmp_path):
    found = images(tmp_path / "images")
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=3)
    with pytest.raises(ConfigError, match="pool is last4 but the encoder has 2 blocks"):
        FeatureStore(tmp_path / "f", ALONE).features(encoder, ImageTransform(encoder, **GREY), found, ["last4"])

"""The warnings at the start of a run: what they say, when they are silent, and that they never stop it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ijepa_scale.config.data import AugmentConfig, DataConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.sanity import sanity_warnings
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.open import training_order, training_source

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LEVELS = {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}


def photo(number):
    small = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC)


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def warnings_of(folder, images, labels, *, reader="shards", batch=4, normalisation=IMAGENET, classes=None):
    write_shards(
        [Sample(f"{n}", png(image), label) for n, (image, label) in enumerate(zip(images, labels, strict=True))],
        folder, classes=classes,
    )  # fmt: skip
    config = DataConfig(reader=reader, train=str(folder), batch_size=batch, synthetic_samples=100)
    source = training_source(config, (64, 64))
    order = training_order(config, source, batch, seed=0, steps_per_epoch=1)
    loader = TrainLoader(source, order, AugmentConfig(), (16, 16), seed=0, stop_step=1, max_bad_fraction=1.0)
    return sanity_warnings(source, next(iter(loader)), **normalisation)


@pytest.mark.parametrize("reader", ["shards", "stream", "synthetic"])
@pytest.mark.parametrize("labels", [(0, 1, 0, 1, 0, 1), (None,) * 6])
def test_ordinary_images_give_no_warning(tmp_path, reader, labels):
    assert warnings_of(tmp_path, [photo(n) for n in range(6)], labels, reader=reader) == []


@pytest.mark.parametrize("reader", ["shards", "stream"])
@pytest.mark.parametrize(
    "normalisation", [LEVELS, {**LEVELS, "std": IMAGENET["std"]}, {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}]
)
def test_normalisation_in_levels(tmp_path, reader, normalisation):
    images = [photo(n) for n in range(4)]
    [line] = warnings_of(tmp_path, images, (0, 1, 2, 3), reader=reader, normalisation=normalisation)
    means = ", ".join(f"{value:.3g}" for value in normalisation["mean"])
    assert f"not about 0 and 1: check augment.mean {means} and augment.std" in line
    assert "which are for pixels from 0 to 1, not 0 to 255" in line
    if reader == "shards":
        level = np.stack([np.asarray(image) for image in images]).mean(axis=(0, 1, 2))
        centre = (level / 255 - normalisation["mean"]) / normalisation["std"]
        assert ", ".join(f"{value:.3g}" for value in centre) in line
        assert line.endswith(f"mean {', '.join(f'{value:.3g}' for value in level)} of 255")


@pytest.mark.parametrize("labels", [(3, 3, 3, 3), (0, 0, 0, 0)])
def test_one_class_only(tmp_path, labels):
    [line] = warnings_of(tmp_path, [photo(n) for n in range(4)], labels, classes=list("abcd"))
    assert line.startswith(f"all 4 images have the label {labels[0]} ({'abcd'[labels[0]]!r}): check that data.train")


def test_one_class_is_found_in_the_whole_set_not_in_the_batch(tmp_path):
    assert warnings_of(tmp_path, [photo(n) for n in range(40)], [0] * 39 + [1], batch=2) == []


@pytest.mark.parametrize("reader", ["shards", "stream"])
def test_images_that_are_alike(tmp_path, reader):
    grey = [Image.new("RGB", (20, 20), (120 + n % 2, 60, 180)) for n in range(4)]
    found = warnings_of(tmp_path, grey, (0, 1, 2, 3), reader=reader)
    alike = [
        line for line in found if line.startswith("the first 4 images are alike, within 2 of 255 levels at 32 x 32")
    ]
    assert len(alike) == 1 and alike[0].endswith("check that data.train holds the images you mean")


def test_copies_of_one_photograph_are_alike_although_their_crops_differ(tmp_path):
    found = warnings_of(tmp_path, [photo(1)] * 4, (0, 1, 2, 3))
    assert len(found) == 1 and "images are alike" in found[0] and f"{tmp_path}/shard-000000.tar:" in found[0]


def test_nothing_is_said_of_one_image(tmp_path):
    assert warnings_of(tmp_path, [photo(1)], (0,), batch=1) == []


def test_images_that_cannot_be_read_again_are_left_to_the_loader(tmp_path):
    write_shards([Sample("a", png(photo(1))[:60], 0), Sample("b", png(photo(2)), 1)], tmp_path)
    config = DataConfig(train=str(tmp_path), batch_size=2)
    source = training_source(config, (8, 8))
    order = training_order(config, source, 2, seed=0, steps_per_epoch=None)
    loader = TrainLoader(source, order, AugmentConfig(), (16, 16), seed=0, stop_step=1, max_bad_fraction=1.0)
    batch = next(iter(loader)).clone()
    batch.sample_ids[:] = 0
    assert sanity_warnings(source, batch, **IMAGENET) == []

"""Resizing and centre cropping for evaluation on the device, against PIL's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.augment import eval_transform as module
from ijepa_scale.augment.eval_transform import EvalTransform
from ijepa_scale.data.eval_reader import center_crop

LEVELS = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}


def made_up(shapes):
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 256, (7, 8, 3), dtype=np.uint8) for _ in shapes]
    return [np.asarray(Image.fromarray(array).resize(shape[::-1])) for array, shape in zip(small, shapes, strict=True)]


@pytest.mark.parametrize(("size", "fraction"), [((32, 32), 0.875), ((32, 48), 1.0), ((33, 20), 0.9)])
def test_the_evaluation_transform_is_pils(size, fraction):
    images = made_up([(60, 90), (90, 61), (37, 37), (20, 70), (12, 9)])
    transform = EvalTransform(size, fraction, **LEVELS)
    found = transform(images)
    assert found.shape == (5, 3, *size)
    for image, levels in zip(images, found, strict=True):
        expected = torch.from_numpy(center_crop(image, size, fraction).copy()).permute(2, 0, 1).float()
        assert (levels - expected).abs().max() <= 1.01


def test_images_of_one_shape_are_resized_together_and_alike(monkeypatch):
    shapes = [(60, 90), (90, 60), (60, 90), (37, 37), (74, 74), (120, 180)]
    images = made_up(shapes)
    transform = EvalTransform((32, 32), 0.875, **LEVELS)
    alone = torch.cat([transform([image]) for image in images])
    calls = []
    crop_resize = module.crop_resize
    monkeypatch.setattr(module, "crop_resize", lambda *args, **kw: (calls.append(args[2]), crop_resize(*args, **kw))[1])
    assert torch.equal(transform(images), alone)
    assert sorted(calls) == [(37, 37), (37, 55), (55, 37)]
    assert transform([]).shape == (0, 3, 32, 32)

"""RandAugment against timm's: operations, frequencies, magnitudes, notation."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import timm.data.auto_augment as timm_auto_augment
import torch
from PIL import Image
from timm.data import create_transform

from ijepa_scale.augment.mae import FinetuneAugment
from ijepa_scale.augment.rand_augment import (
    OPERATIONS,
    RandAugment,
    posterize_bits,
    solarize_addend,
    solarize_threshold,
)  # fmt: skip
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig
from ijepa_scale.config.rand_augment_notation import parse
from ijepa_scale.errors import ConfigError

RECIPE = "rand-m9-mstd0.5-inc1"
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def timms(interpolation="bicubic", text=RECIPE):
    """Returns timm's RandAugment as its training transform sets it up."""
    chain = create_transform(224, is_training=True, auto_augment=text, interpolation=interpolation)
    (found,) = [step for step in chain.transforms if isinstance(step, timm_auto_augment.RandAugment)]
    return found


def draws(text=RECIPE, count=40_000):
    augment = RandAugment(parse(text), seed=0, fill=(0, 0, 0))
    return augment.draw(epoch=0, sample_ids=np.arange(count))


def test_operations_are_chosen_as_often_as_timms():
    layers = draws()
    assert len(layers) == 2 and len(OPERATIONS) == 15
    assert list(OPERATIONS) == timm_auto_augment._RAND_INCREASING_TRANSFORMS
    for operations, values in layers:
        applied = operations[operations >= 0]
        assert len(applied) / len(operations) == pytest.approx(0.5, abs=0.01)
        counts = np.bincount(applied, minlength=15) / len(applied)
        assert counts == pytest.approx(np.full(15, 1 / 15), abs=0.006)
        assert (values < 0).mean() == pytest.approx(0.5, abs=0.01)
        assert np.abs(values).mean() == pytest.approx(8.98, abs=0.02) and np.abs(values).max() == 10.0
    assert np.corrcoef(layers[0][0], layers[1][0])[0, 1] == pytest.approx(0.0, abs=0.02)


def test_magnitudes_are_spread_as_timms():
    random.seed(0)
    seen = []
    operation = timm_auto_augment.AugmentOp("Invert", prob=1.0, magnitude=9, hparams={"magnitude_std": 0.5})
    operation.level_fn = lambda magnitude, _: (seen.append(magnitude), ())[1]
    picture = Image.new("RGB", (4, 4))
    for _ in range(5_000):
        operation(picture)
    ours = np.abs(np.concatenate([values for _, values in draws()]))
    share = [5, 25, 50, 75, 95]
    assert np.percentile(ours, share) == pytest.approx(np.percentile(seen, share), abs=0.05)


def test_levels_of_a_magnitude_are_timms():
    for magnitude in np.linspace(0, 10, 41):
        values = np.array([magnitude, -magnitude])
        assert posterize_bits(values)[0] == timm_auto_augment._posterize_increasing_level_to_arg(magnitude, None)[0]
        assert solarize_threshold(values)[1] == timm_auto_augment._solarize_increasing_level_to_arg(magnitude, None)[0]
        assert solarize_addend(values)[0] == timm_auto_augment._solarize_add_level_to_arg(magnitude, None)[0]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_is_timms_at_a_fixed_magnitude(name, interpolation, monkeypatch):
    """Both run at magnitude 9, with the same sign; PIL's pictures are compared level by level."""
    generator = np.random.default_rng(1)
    small = [generator.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(4)]
    pictures = [Image.fromarray(array).resize((40, 28), Image.Resampling.BICUBIC) for array in small]
    augment = RandAugment(parse("rand-m9-n1-p1-inc1"), seed=0, fill=(124, 116, 104), interpolation=interpolation)
    number = list(OPERATIONS).index(name)
    monkeypatch.setattr(
        augment, "draw", lambda epoch, sample_ids: [(np.full(4, number), np.array([9.0, -9.0, 9.0, -9.0]))]
    )
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    found = augment(images, epoch=0, sample_ids=np.arange(4)).permute(0, 2, 3, 1).numpy()
    hparams = {"img_mean": (124, 116, 104), "interpolation": RESAMPLING[interpolation]}
    operation = timm_auto_augment.AugmentOp(name, prob=1.0, magnitude=9, hparams=hparams)
    for place, sign in enumerate((1, -1, 1, -1)):
        monkeypatch.setattr(timm_auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        apart = np.abs(found[place].astype(int) - np.array(operation(pictures[place])).astype(int))
        assert apart.max() <= 1 and apart.mean() < 0.3, (place, apart.max(), apart.mean())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-m9-mstd0.5", "only the operations that grow with the magnitude are there"),
        ("augmix-m3", "'m3'|'augmix-m3'; give rand"),
        ("rand-m9-tweights-inc1", "of which 'tweights' isn't known; give fields m, n, p, mstd, mmax and inc1"),
        ("rand-m9-inc1-q3", "of which 'q3' isn't known"),
        ("rand-m9-inc1-m8", "of which 'm8' comes twice; give fields"),
        ("rand-n0-inc1", "'rand-n0-inc1'; give layers n1, n2, ... and an mmax above 0"),
        ("rand-n1.5-inc1", "'rand-n1.5-inc1'; give layers n1, n2"),
        ("rand-mmax0-inc1", "'rand-mmax0-inc1'; .* and an mmax above 0"),
        ("rand-m9-p5-inc1", "of which p5 isn't a probability; give p0 to p1"),
    ],
)
def test_other_notations_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_notation_is_read():
    assert dataclasses.astuple(parse("rand-m7-n3-p0.25-mstd1-mmax12-inc1")) == (7.0, 3, 0.25, 1.0, 12.0)
    assert parse("rand-mstd101-inc1").magnitude_std == math.inf and parse("rand-mstd100-inc1").magnitude_std == 100
    assert dataclasses.astuple(parse(RECIPE)) == (9.0, 2, 0.5, 0.5, 10.0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_fill_and_resampling_are_those_of_timms_training_transform(interpolation):
    ours = FinetuneAugment(FinetuneAugmentConfig(interpolation=interpolation), (8, 8), num_classes=2, seed=0)
    assert ours._rand_augment is not None
    for operation in timms(interpolation).ops:
        assert operation.kwargs["fillcolor"] == tuple(ours._rand_augment._fill.tolist())
        assert operation.kwargs["resample"] == RESAMPLING[ours._rand_augment._interpolation]
        assert operation.hparams.get("translate_pct", 0.45) == 0.45


@pytest.mark.parametrize("text", [RECIPE, "rand-m5-n3-p0.8-mstd101-mmax4-inc1"])
def test_draws_are_distributed_as_timms(text):
    """How often each operation runs, how often none or several do on an image, and how strongly."""
    random.seed(1)
    np.random.seed(1)
    theirs, picture, count = timms(text=text), Image.new("RGB", (2, 2)), 4_000
    ran: list[list[tuple[int, float]]] = []
    for number, operation in enumerate(theirs.ops):
        operation.level_fn = lambda magnitude, _, number=number: (ran[-1].append((number, magnitude)), ())[1]
        operation.aug_fn = lambda image, **_: image
    for _ in range(count):
        ran.append([])
        theirs(picture)
    layers = draws(text, count)
    ours = np.stack([operations for operations, _ in layers], axis=1)
    signed = np.stack([values for _, values in layers], axis=1)
    pairs = [
        (np.bincount(ours[ours >= 0], minlength=15), np.bincount([n for row in ran for n, _ in row], minlength=15)),
        (np.bincount((ours >= 0).sum(axis=1), minlength=4), np.bincount([len(row) for row in ran], minlength=4)),
    ]
    for found, expected in pairs:
        used = found + expected > 0
        assert used.sum() >= 3
        # two samples of one distribution: each term is a squared normal number
        scaled = ((found - expected)[used] ** 2 / (found + expected)[used]).sum()
        assert scaled < 2.5 * used.sum(), (found, expected)
    magnitudes = np.abs(signed[ours >= 0]), np.array([magnitude for row in ran for _, magnitude in row])
    share = [2, 10, 25, 50, 75, 90]
    assert np.percentile(magnitudes[0], share) == pytest.approx(np.percentile(magnitudes[1], share), abs=0.1)
    assert [m.max() for m in magnitudes] == pytest.approx([theirs.ops[0].magnitude_max or 10.0] * 2)


def test_an_operation_runs_once_per_layer(monkeypatch):
    calls = []
    for name, operation in OPERATIONS.items():
        run = lambda images, *rest, name=name, operation=operation: (calls.append(name), operation(images, *rest))[1]  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, run)
    images = torch.randint(0, 256, (300, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = RandAugment(parse("rand-p1-inc1"), seed=0, fill=(1, 2, 3))(images, epoch=0, sample_ids=np.arange(300))
    assert calls == 2 * list(OPERATIONS) and found.shape == (300, 3, 6, 5)

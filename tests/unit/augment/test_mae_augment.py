"""Erasing, mixing and finetuning's chain: frequencies, what each does, and what it may not depend on."""

from __future__ import annotations

import collections
import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision.transforms import ColorJitter

from ijepa_scale import rng
from ijepa_scale.augment.erasing import RandomErasing
from ijepa_scale.augment.mae import FinetuneAugment
from ijepa_scale.augment.mixing import Mixing, check_pairs
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.errors import ConfigError

RECIPE = "rand-m9-mstd0.5-inc1"
SIZE = (24, 32)


def config(**changes) -> FinetuneAugmentConfig:
    off = {
        "rand_augment": None,
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.0,
        "flip": 0.0,
    }
    return FinetuneAugmentConfig(**{**off, **changes})


def a_batch(count=8, step=3, position=0) -> Batch:
    """Returns crops of different sizes; sample ids and labels go with the place in the global batch."""
    places = np.arange(position, position + count)
    crops = [np.random.default_rng(place).integers(0, 256, (20 + place % 5, 30, 3), dtype=np.uint8) for place in places]
    return Batch(
        pixels=torch.from_numpy(np.concatenate([crop.reshape(-1) for crop in crops])),
        sizes=np.array([crop.shape[:2] for crop in crops]),
        sample_ids=places * 7,
        labels=torch.from_numpy(places % 5),
        step=step,
        epoch=1,
        position=position,
    )


def backwards_of(batch: Batch) -> Batch:
    return dataclasses.replace(
        batch,
        pixels=torch.cat([batch.crop(row).flatten() for row in reversed(range(len(batch)))]),
        sizes=batch.sizes[::-1],
        sample_ids=batch.sample_ids[::-1],
        labels=batch.labels.flip(0),
    )


def run(changes, batch, seed=0):
    return FinetuneAugment(config(**changes), SIZE, num_classes=5, seed=seed)(batch)


ALL = {
    "rand_augment": RECIPE, "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "flip": 0.5,
    "color_jitter": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_chain_does_not_depend_on_the_split(parts):
    whole = run(ALL, a_batch(8))
    each = 8 // parts
    images, targets = zip(*(run(ALL, a_batch(each, position=p * each)) for p in range(parts)), strict=True)
    assert torch.equal(torch.cat(images), whole[0]) and torch.equal(torch.cat(targets), whole[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"rand_augment": RECIPE},
        {"color_jitter": 0.4},
        {"random_erasing": 1.0},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"flip": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_option_does_something_and_is_keyed(changes):
    plain, _ = run({}, a_batch())
    found, _ = run(changes, a_batch())
    again, _ = run(changes, a_batch())
    assert torch.equal(found, again) and not torch.equal(found, plain)
    if changes != {"flip": 1.0}:
        other, _ = run(changes, a_batch(), seed=1)
        assert not torch.equal(found, other)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_image_alone_is_the_image_in_its_batch(interpolation):
    """Bit for bit, whatever else is in the batch, and in whatever order."""
    options = {**ALL, "mixup": 0.0, "cutmix": 0.0, "interpolation": interpolation}
    together, targets = run(options, a_batch(16))
    backwards, _ = run(options, backwards_of(a_batch(16)))
    assert torch.equal(backwards.flip(0), together)
    for row in range(16):
        image, target = run(options, a_batch(1, position=row))
        assert torch.equal(image[0], together[row]) and torch.equal(target[0], targets[row])


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_colour_jitter_is_torchvisions_on_pils_pictures(strength):
    """Each image is one of torchvision's 6 orders, and factors are spread as its ColorJitter draws them."""
    batch, identity = a_batch(12), {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    plain, found = (run({**identity, "color_jitter": s}, batch)[0].round().to(torch.uint8) for s in (1e-9, strength))
    draws = rng.uniform(0, "finetune.jitter", batch.epoch, batch.sample_ids, 6)
    low = max(0.0, 1.0 - strength)
    assert ColorJitter(strength, strength, strength).contrast == (low, 1.0 + strength)
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = set()
    for row in range(len(batch)):
        picture = Image.fromarray(plain[row].permute(1, 2, 0).numpy())
        order = tuple(np.argsort(draws[row, 3:]).tolist())
        for number in order:
            factor = low + (1.0 + strength - low) * draws[row, number]
            picture = enhance[number](picture).enhance(float(np.float32(factor)))
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (found[row].int() - expected.int()).abs().max() <= 1
        assert (found[row].int() - plain[row].int()).abs().float().mean() > 1
        orders.add(order)
    assert len(orders) > 3


def test_flip_mirrors_the_images_that_draw_it():
    plain, _ = run({}, a_batch())
    flipped, _ = run({"flip": 1.0}, a_batch())
    assert torch.equal(flipped, plain.flip(-1))


def test_labels_are_smoothed():
    _, targets = run({"label_smoothing": 0.1}, a_batch())
    assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 8)
    assert targets.amax(dim=1).tolist() == pytest.approx([0.92] * 8) and targets.amin().item() == pytest.approx(0.02)
    _, hard = run({}, a_batch())
    assert hard.argmax(dim=1).tolist() == [0, 1, 2, 3, 4, 0, 1, 2] and hard.sum().item() == 8


def test_erased_boxes_are_as_timms():
    boxes = RandomErasing(0.25, seed=0).draw((224, 224), epoch=0, sample_ids=np.arange(20_000))
    erased = boxes[boxes[:, 2] > 0]
    assert len(erased) / len(boxes) == pytest.approx(0.25, abs=0.01)
    assert (erased[:, :2] >= 0).all() and (erased[:, :2] + erased[:, 2:] <= 224).all()
    random.seed(0)
    eraser = TimmErasing(probability=1.0, mode="const", device="cpu")
    areas, aspects = [], []
    for _ in range(3_000):
        gone = eraser(torch.ones(1, 224, 224))[0] == 0
        height, width = int(gone.any(dim=1).sum()), int(gone.any(dim=0).sum())
        areas.append(height * width)
        aspects.append(np.log(height / width))
    share = [10, 50, 90]
    ours = erased[:, 2] * erased[:, 3]
    assert np.percentile(ours, share) == pytest.approx(np.percentile(areas, share), rel=0.08)
    assert np.percentile(np.log(erased[:, 2] / erased[:, 3]), share) == pytest.approx(
        np.percentile(aspects, share), abs=0.12
    )


def test_erased_pixels_are_normal_noise_and_the_others_stay():
    images = torch.full((16, 3, 64, 64), 7.0)
    eraser = RandomErasing(1.0, seed=0)
    boxes = eraser.draw((64, 64), epoch=0, sample_ids=np.arange(16))
    found = eraser(images.clone(), epoch=0, sample_ids=np.arange(16))
    noise = []
    for row, (top, left, height, width) in enumerate(boxes):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (found[row][:, ~inside] == 7.0).all()
        noise.append(found[row][:, inside].flatten())
    noise = torch.cat(noise)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03) and noise.std().item() == pytest.approx(1.0, abs=0.03)


def mixed(count=4000, **changes):
    mixing = Mixing(config(**changes), num_classes=5, seed=0)
    return mixing.draw((32, 32), step=0, position=0, count=count)


def test_shares_and_switching_are_timms():
    shares, boxes = mixed(mixup=0.8, cutmix=1.0)
    assert (shares[::2] == shares[1::2]).all() and (boxes[::2] == boxes[1::2]).all()
    cut = boxes[::2, 2] > 0
    assert cut.mean() == pytest.approx(0.5, abs=0.04)
    np.random.seed(0)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, num_classes=5)
    drawn = collections.defaultdict(list)
    for _ in range(2000):
        share, use_cutmix = theirs._params_per_batch()
        if use_cutmix:
            _, share = cutmix_bbox_and_lam((1, 3, 32, 32), share)
        drawn[use_cutmix].append(share)
    for is_cut in (False, True):
        ours = shares[::2][cut == is_cut]
        assert np.percentile(ours, [10, 50, 90]) == pytest.approx(np.percentile(drawn[is_cut], [10, 50, 90]), abs=0.07)


def test_mixup_blends_pairs_and_their_labels():
    batch = a_batch()
    plain, hard = run({}, batch)
    found, soft = run({"mixup": 0.8}, batch)
    shares = Mixing(config(mixup=0.8), num_classes=5, seed=0).draw(SIZE, step=3, position=0, count=8)[0]
    other = [1, 0, 3, 2, 5, 4, 7, 6]
    share = torch.from_numpy(shares)[:, None]
    torch.testing.assert_close(soft, share * hard + (1 - share) * hard[other])
    share = share[..., None, None]
    torch.testing.assert_close(found, share * plain + (1 - share) * plain[other], rtol=0, atol=1e-5)


def test_cutmix_pastes_a_box_and_shares_the_label_by_area():
    batch = a_batch()
    plain, hard = run({}, batch)
    found, soft = run({"cutmix": 1.0}, batch)
    other = [1, 0, 3, 2, 5, 4, 7, 6]
    boxes = Mixing(config(cutmix=1.0), num_classes=5, seed=0).draw(SIZE, step=3, position=0, count=8)[1]
    assert (boxes[:, 2] > 0).sum() >= 4
    for row, (top, left, height, width) in enumerate(boxes):
        inside = torch.zeros(SIZE, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(found[row][:, ~inside], plain[row][:, ~inside])
        torch.testing.assert_close(found[row][:, inside], plain[other[row]][:, inside], rtol=0, atol=1e-6)
        share = 1 - inside.float().mean()
        torch.testing.assert_close(soft[row], share * hard[row] + (1 - share) * hard[other[row]])


def test_pairs_that_draw_nothing_stay():
    plain, hard = run({}, a_batch())
    found, soft = run({"mixup": 0.8, "cutmix": 1.0, "mix_probability": 0.0}, a_batch())
    assert torch.equal(found, plain) and torch.equal(soft, hard)


def test_odd_micro_batches_are_refused():
    text = "a micro-batch has 3 images, but mixup and cutmix mix pairs; try data.batch_size=2, or set"
    with pytest.raises(ConfigError, match=text):
        run({"mixup": 0.8}, a_batch(3))
    with pytest.raises(ConfigError, match=text):
        check_pairs(3, 1, config(cutmix=1.0))
    check_pairs(3, 1, config())
    assert len(run({}, a_batch(3))[0]) == 3


def test_another_step_mixes_otherwise():
    first, second = (run({"mixup": 0.8}, a_batch(step=step))[0] for step in (3, 4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mixup": -1.0}, "augment.mixup is -1.0; give at least 0"),
        ({"random_erasing": 1.5}, "augment.random_erasing is 1.5; give a number from 0 to 1"),
        ({"color_jitter": -0.4}, "augment.color_jitter is -0.4; give at least 0"),
        ({"rand_augment": "rand-m9"}, "augment.rand_augment is 'rand-m9'; give rand-...-inc1"),
        ({"rand_augment": "m9", "flip": 2.0}, "augment.flip is 2.0; .*\n*augment.rand_augment is 'm9'; give rand"),
        ({"interpolation": "nearest"}, "augment.interpolation is 'nearest'; choose one of bilinear, bicubic"),
        ({"std": (0.0, 1.0, 1.0)}, "augment.std is .*; give a number above 0 for each channel"),
    ],
)
def test_wrong_settings_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        FinetuneAugmentConfig(**changes)

"""Augmentation: each operation against torchvision's, each sample by its own draws."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image

from ijepa_scale.augment import Augment, color
from ijepa_scale.augment.blur import GaussianBlur
from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.batch import Batch

LEVEL = 1 / 255
EVERYTHING = AugmentConfig(flip=0.5, color_jitter=0.5, grayscale=0.3, blur=0.5, solarize=0.4)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def images_of(count=6, size=(20, 23), seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, *size), dtype=np.uint8)
    images[0, :, :5] = 77  # gray
    images[0, :, 5:7] = 0
    images[0, 0, 7:9] = 255  # a channel that ties with another
    images[0, 1, 7:9] = 255
    return torch.from_numpy(images)


def a_batch(count=12, size=(20, 23), epoch=0, seed=0):
    images = images_of(count, size, seed).permute(0, 2, 3, 1)
    generator = np.random.default_rng(seed)
    sizes = np.stack(
        [generator.integers(size[0] // 2, size[0] + 1, count), generator.integers(5, size[1] + 1, count)], 1
    )
    ids = generator.permutation(1000)[:count].astype(np.int64)
    labels = torch.full((count,), -1)
    pixels = torch.cat([image[:h, :w].flatten() for image, (h, w) in zip(images, sizes, strict=True)])
    return Batch(pixels=pixels, sizes=sizes, sample_ids=ids, labels=labels, step=0, epoch=epoch, position=0)


def rows(batch, chosen):
    return Batch(
        pixels=torch.cat([batch.crop(row).flatten() for row in chosen]),
        sizes=batch.sizes[chosen], sample_ids=batch.sample_ids[chosen],
        labels=batch.labels[chosen], step=99, epoch=batch.epoch, position=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (color.brightness, tv.adjust_brightness, [0.0, 0.3, 1.0, 1.7, 2.0, 0.9]),
        (color.contrast, tv.adjust_contrast, [0.0, 0.3, 1.0, 1.7, 2.0, 0.9]),
        (color.saturation, tv.adjust_saturation, [0.0, 0.3, 1.0, 1.7, 2.0, 0.9]),
        (color.hue, tv.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.25, 0.5]),
    ],
)
def test_colour_operations_equal_torchvisions(ours, theirs, factors):
    images = images_of()
    result = ours(images / 255.0, torch.tensor(factors)[:, None, None, None])
    for row, factor in enumerate(factors):
        torch.testing.assert_close(result[row], theirs(images[row] / 255.0, factor), atol=2e-5, rtol=0)
        eight_bits = theirs(images[row], factor).float()  # torchvision cuts off, and rounds the luma first
        assert (torch.floor(result[row] * 255.0 + 1e-3) - eight_bits).abs().max() <= 1


def test_grayscale_equals_torchvisions():
    images = images_of()
    gray = color.grayscale(images / 255.0)
    torch.testing.assert_close(gray, tv.rgb_to_grayscale(images / 255.0), atol=1e-6, rtol=0)


def test_solarize_equals_torchvisions():
    images = images_of()
    expected = torch.stack([tv.solarize(image.to(torch.uint8), 128) for image in images])
    found = (color.solarize(images.to(torch.uint8).float() / 255.0) * 255.0).round().to(torch.uint8)
    assert torch.equal(found, expected) and not torch.equal(found, images.to(torch.uint8))


@pytest.mark.parametrize("size", [(20, 23), (4, 7), (1, 9)])
def test_blur_equals_torchvisions(size):
    images = images_of(4, (20, 23))[:, :, : size[0], : size[1]] / 255.0
    sigmas = [0.1, 0.7, 1.3, 2.0]
    blurred = GaussianBlur(size, max_sigma=2.0)(images, torch.tensor(sigmas)[:, None, None, None])
    radius = [min(6, side - 1) for side in size]
    for row, sigma in enumerate(sigmas):
        expected = tv.gaussian_blur(images[row], [2 * radius[1] + 1, 2 * radius[0] + 1], [sigma, sigma])
        torch.testing.assert_close(blurred[row], expected, atol=1e-5, rtol=0)


def test_blur_ignores_autocast():
    images, sigma = images_of(2) / 255.0, torch.full((2, 1, 1, 1), 1.0)
    blur = GaussianBlur((20, 23), max_sigma=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blur(images, sigma), blur(images, sigma).float())
        inside = blur(images, sigma)
    assert torch.equal(inside, blur(images, sigma))


def test_without_augmentation_images_are_resized_and_normalised():
    batch, config = a_batch(), AugmentConfig()
    images = Augment(config, (16, 18), seed=0)(batch)
    assert images.dtype == torch.float32 and images.shape == (12, 3, 16, 18)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    for row in range(len(batch)):
        crop = Image.fromarray(batch.crop(row).numpy())
        expected = torch.from_numpy(np.asarray(crop.resize((18, 16), Image.Resampling.BILINEAR)).copy()) / 255.0
        assert ((images[row] * std + mean) - expected.permute(2, 0, 1)).abs().max() <= LEVEL + 1e-5


def test_a_sample_does_not_depend_on_its_batch():
    batch = a_batch()
    augment = Augment(EVERYTHING, (16, 16), seed=4)
    together = augment(batch)
    chosen = np.array([7, 2, 11])
    torch.testing.assert_close(augment(rows(batch, chosen)), together[chosen], atol=1e-5, rtol=0)
    for row in range(12):
        torch.testing.assert_close(augment(rows(batch, [row]))[0], together[row], atol=1e-5, rtol=0)


def test_seed_and_epoch_change_the_draws_and_nothing_else_does():
    batch = a_batch()
    first = Augment(EVERYTHING, (16, 16), seed=0)(batch)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(Augment(EVERYTHING, (16, 16), seed=0)(batch), first)
    assert not torch.equal(Augment(EVERYTHING, (16, 16), seed=1)(batch), first)
    assert not torch.equal(Augment(EVERYTHING, (16, 16), seed=0)(a_batch(epoch=1)), first)


def test_probabilities_and_the_pixels_are_kept():
    batch = a_batch(400, (8, 8))
    before = batch.pixels.clone()
    plain = Augment(AugmentConfig(**RAW), (8, 8), seed=0)(batch)
    share = {}
    for name, config in {
        "flip": {"flip": 0.3},
        "grayscale": {"grayscale": 0.3},
        "solarize": {"solarize": 0.3},
        "blur": {"blur": 0.3},
        "jitter": {"color_jitter": 0.5, "color_jitter_probability": 0.3},
    }.items():
        images = Augment(AugmentConfig(**RAW, **config), (8, 8), seed=0)(batch)
        changed = (images - plain).abs().amax(dim=(1, 2, 3)) > 1e-4
        share[name] = changed.float().mean().item()
        if name == "flip":
            assert (images[changed] - plain[changed].flip(-1)).abs().max() <= 1.01 * LEVEL
        if name == "grayscale":
            assert torch.equal(images[changed][:, 0], images[changed][:, 2])
    assert all(0.2 < value < 0.4 for value in share.values()), share
    assert torch.equal(batch.pixels, before)
    always = Augment(AugmentConfig(**RAW, flip=1.0), (8, 8), seed=0)(batch)
    assert (always - plain.flip(-1)).abs().max() <= 1.01 * LEVEL


def test_jitter_draws_factors_and_an_order_per_sample():
    """The jittered image equals torchvision's operations run in one of their 24 orders, and orders differ."""
    config = AugmentConfig(**RAW, color_jitter=1.0, color_jitter_probability=1.0)
    batch = a_batch(8, (8, 8))
    plain = Augment(AugmentConfig(**RAW), (8, 8), seed=0)(batch)
    augment = Augment(config, (8, 8), seed=0)
    from ijepa_scale import rng
    from ijepa_scale.augment import pipeline

    draws = rng.uniform(0, "augment", 0, batch.sample_ids, pipeline._DRAWS)
    result = augment(batch)
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    orders = set()
    for row in range(8):
        unit = 2 * draws[row, 2:6] - 1
        factors = [1 + 0.8 * unit[0], 1 + 0.8 * unit[1], 1 + 0.8 * unit[2], 0.2 * unit[3]]
        order = tuple(int(n) for n in np.argsort(draws[row, 6:10]))
        orders.add(order)
        expected = plain[row]
        for number in order:
            expected = operations[number](expected, float(factors[number]))
        torch.testing.assert_close(result[row], expected, atol=1e-4, rtol=0)
    assert len(orders) > 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu_without_synchronising():
    batch = a_batch()
    expected = Augment(EVERYTHING, (16, 16), seed=0)(batch)
    augment, batch = Augment(EVERYTHING, (16, 16), seed=0, device="cuda"), batch.to("cuda")
    augment(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = augment(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (images.cpu() - expected).abs().mean() < 0.02

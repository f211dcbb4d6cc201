"""The Triton kernel: against the reference under the interpreter, and the variants that its warm-up compiles."""

import json

import numpy as np
import pytest
import torch

from ijepa_kernels.crop_resize import triton as kernels
from ijepa_scale.augment import mae, pipeline
from ijepa_scale.config import AugmentConfig
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import decode_crop, longest_sides
from tests.unit.kernels.kernel_harness import run


def a_batch(count):
    return Batch(
        pixels=torch.zeros(count * 20 * 20 * 3, dtype=torch.uint8), sizes=np.full((count, 2), 20),
        sample_ids=np.arange(count), labels=torch.zeros(count, dtype=torch.int64), step=0, epoch=0, position=0,
    )  # fmt: skip


@pytest.mark.long
def test_the_kernel_equals_the_reference_under_the_interpreter():
    found = json.loads(run("-m", "tests.unit.kernels.interpret_crop_resize", TRITON_INTERPRET="1").splitlines()[-1])
    assert len(found) == 12
    for name, off in found.items():
        # sums in another order tip ties of the rounding, which small whole ratios make common
        assert off["levels"] <= 1 and off["share"] < 0.01, (name, off)
        assert off["normalised"] < 1e-6, (name, off)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("output", [(32, 32), (32, 48)], ids=str)
def test_the_warm_up_compiles_every_variant_that_crops_can_need(monkeypatch, interpolation, output):
    """A stand-in for the kernel records what Triton compiles for: the number of taps, and where pixels begin."""
    variants = set()

    class Kernel:
        def __getitem__(self, grid):
            return lambda pixels, *_, TAPS, **__: variants.add((TAPS, pixels.data_ptr() % 16 == 0))

    monkeypatch.setattr(kernels, "_kernel", Kernel())
    ratio, options = (3 / 4, 4 / 3), {"interpolation": interpolation, "dtype": torch.float32}
    ones = ((1.0,) * 3, (0.0,) * 3)
    kernels.warm_up(output, longest_sides(output, ratio), **options, normalise=ones, device=torch.device("cpu"))
    warm, needed = frozenset(variants), set()
    variants.clear()
    rng = np.random.default_rng(0)
    for side in rng.integers(2, 400, (300, 2)):
        pixels = np.zeros((*side, 3), dtype=np.uint8)
        crop = decode_crop(pixels, rng.random(40).tolist(), output, scale=(0.05, 1.0), ratio=ratio)
        for begin in (0, 1):
            flat = torch.zeros(crop.size + 16, dtype=torch.uint8)[begin : begin + crop.size]
            kernels.crop_resize(flat, np.array([crop.shape[:2]]), output, **options, flip=None, normalise=ones)
    needed = frozenset(variants)
    assert len({taps for taps, _ in needed}) > 1 and needed <= warm and len(warm) <= 8


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_augmentations_warm_up_in_their_first_call_only(monkeypatch, jitter):
    for module, made in (
        (pipeline, pipeline.Augment(AugmentConfig(color_jitter=jitter), (16, 16), seed=0)),
        (mae, mae.FinetuneAugment(FinetuneAugmentConfig(color_jitter=jitter, rand_augment=None), (16, 16),
                                  num_classes=2, seed=0)),
    ):  # fmt: skip
        calls = []
        monkeypatch.setattr(module, "warm_up", lambda *sides, calls=calls, **options: calls.append((sides, options)))
        for _ in range(2):
            made(a_batch(2))
        ((sides, options),) = calls
        assert sides[0] == (16, 16) and ("normalise" in options) == (not jitter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_full_size_on_a_gpu(interpolation):
    from ijepa_kernels.crop_resize import crop_resize
    from tests.unit.kernels.test_crop_resize import some_crops

    generator = np.random.default_rng(0)
    pixels, sizes, _ = some_crops(generator.integers(1, 450, (128, 2)), smooth=False)
    flip = generator.random(128) < 0.5
    options = {"interpolation": interpolation, "flip": flip}
    expected = crop_resize(pixels.cuda(), sizes, (224, 224), implementation="reference", **options)
    levels = crop_resize(pixels.cuda(), sizes, (224, 224), **options)
    off = (levels.int() - expected.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01

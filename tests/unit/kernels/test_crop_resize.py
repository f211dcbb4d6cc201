"""crop_resize against PIL, for both implementations."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_kernels.crop_resize import cost, crop_resize, crop_resize_reference

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
BOTH = pytest.mark.parametrize("implementation", [crop_resize, crop_resize_reference])
CASES = [  # crops (height, width) of one batch, output
    ([(37, 53), (53, 37), (60, 60)], (28, 28)),
    ([(1, 1), (1, 50), (50, 1), (2, 3)], (16, 9)),
    ([(20, 20), (5, 7), (28, 28), (28, 31)], (28, 28)),
    ([(3, 4), (10, 9)], (64, 33)),  # upscaling
    ([(301, 199), (224, 224), (130, 263)], (96, 96)),
]


def by_pil(pixels, output, interpolation):
    """PIL's own resize, horizontal pass first, as all of PIL was before it began to pick the order by shape."""
    image = Image.fromarray(pixels)
    kind = FILTERS[interpolation]
    return np.asarray(image.resize((output[1], image.height), kind).resize((output[1], output[0]), kind))


def some_crops(sizes, seed=0, smooth=False):
    """Returns (pixels, sizes, crops)."""
    generator = np.random.default_rng(seed)
    crops = []
    for height, width in sizes:
        crop = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if smooth:
            crop = np.asarray(Image.fromarray(crop[::8, ::8].copy()).resize((width, height), Image.Resampling.BICUBIC))
        crops.append(crop)
    return flat(crops), np.array(sizes), crops


def flat(crops):
    return torch.from_numpy(np.concatenate([crop.reshape(-1) for crop in crops]))


@BOTH
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("sizes", "output"), CASES)
def test_within_one_level_of_pil(implementation, interpolation, sizes, output):
    pixels, sizes, crops = some_crops(sizes)
    images = implementation(pixels, sizes, output, interpolation=interpolation)
    assert images.dtype == torch.uint8 and images.shape == (len(sizes), 3, *output)
    for image, crop in zip(images, crops, strict=True):
        ours = image.permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(ours - by_pil(crop, output, interpolation))
        assert difference.max() <= 1
        assert difference.mean() < 0.1  # rounding of ties, which small whole ratios make common


@BOTH
def test_bilinear_equals_one_call_of_pil_in_any_order_of_passes(implementation):
    pixels, sizes, crops = some_crops([(200, 90), (90, 200)], smooth=True)
    images = implementation(pixels, sizes, (40, 44))
    for image, crop in zip(images, crops, strict=True):
        expected = np.asarray(Image.fromarray(crop).resize((44, 40), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


@BOTH
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_flip_mirrors_the_chosen_results(implementation, interpolation):
    pixels, sizes, _ = some_crops([(30, 20), (20, 30), (9, 9)])
    plain = implementation(pixels, sizes, (12, 17), interpolation=interpolation).int()
    flip = np.array([True, False, True])
    flipped = implementation(pixels, sizes, (12, 17), interpolation=interpolation, flip=flip).int()
    for row in range(3):
        expected = plain[row].flip(-1) if flip[row] else plain[row]
        assert (flipped[row] - expected).abs().max() <= (1 if flip[row] else 0)


@BOTH
def test_a_sample_does_not_depend_on_its_batch(implementation):
    pixels, sizes, crops = some_crops([(30, 20), (20, 30), (9, 9)])
    together = implementation(pixels, sizes, (12, 12), interpolation="bicubic").int()
    alone = implementation(flat(crops[2:]), sizes[2:], (12, 12), interpolation="bicubic").int()
    assert (together[2] - alone[0]).abs().max() == 0


def test_the_reference_stays_in_float32_under_autocast():
    pixels, sizes, _ = some_crops([(100, 120)])
    expected = crop_resize_reference(pixels, sizes, (50, 50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_resize_reference(pixels, sizes, (50, 50)), expected)


@BOTH
def test_an_empty_batch(implementation):
    images = implementation(torch.zeros(0, dtype=torch.uint8), np.zeros((0, 2), dtype=int), (8, 8))
    assert images.shape == (0, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_cuda_equals_the_reference_on_the_cpu(interpolation):
    pixels, sizes, _ = some_crops([(301, 199), (1, 7), (64, 64)])
    expected = crop_resize_reference(pixels, sizes, (96, 80), interpolation=interpolation)
    images = crop_resize(pixels.cuda(), sizes, (96, 80), interpolation=interpolation).cpu()
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(96).half()}, r"pixels are \(96,\) torch.float16; give \(values,\) uint8, uint16 or"),
        ({"channels": 0}, "channels is 0; give at least 1"),
        ({"channels": 2}, "have 64 values, pixels has 96; leave no gaps"),
        ({"sizes": np.ones((3, 3), int)}, r"sizes are \(3, 3\) int64; give integers \(B, 2\)"),
        ({"sizes": np.ones((2, 2))}, r"sizes are \(2, 2\) float64; give integers"),
        ({"sizes": np.array([[4, 4], [5, 4]])}, "have 108 values, pixels has 96; leave no gaps"),
        ({"sizes": np.array([[4, 4], [0, 4]])}, "the smallest crop has 0 pixels a side; give at least 1"),
        ({"output": (0, 4)}, r"output is \(0, 4\); give"),
        ({"interpolation": "nearest"}, "interpolation 'nearest' is unknown; choose one of bilinear, bicubic"),
        ({"flip": np.array([True])}, r"flip is \(1,\) for 2 images"),
        (
            {"dtype": torch.float16},
            "dtype is torch.float16; give float32 or bfloat16, or uint8 for uint8 pixels",
        ),
        ({"normalise": ((1, 1, 1), (0, 0, 0)), "dtype": torch.uint8}, "dtype is torch.uint8; give"),
        ({"normalise": ((1,), (0, 0, 0)), "dtype": torch.float32}, "normalise has 1 and 3 numbers; give 3 and 3"),
        ({"implementation": "numpy"}, "implementation 'numpy' is unknown; choose one of auto, cpu, reference, triton"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    arguments = {
        "pixels": torch.zeros(96, dtype=torch.uint8),
        "sizes": np.full((2, 2), 4),
        "output": (4, 4),
        "interpolation": "bilinear",
        "flip": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        crop_resize(arguments.pop("pixels"), arguments.pop("sizes"), arguments.pop("output"), **arguments)


def test_triton_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ijepa_kernels.crop_resize.triton", None)
    with pytest.raises(ValueError, match="Triton is needed .*install triton, or choose implementation='reference'"):
        crop_resize(torch.zeros(3, dtype=torch.uint8), np.ones((1, 2), int), (4, 4), implementation="triton")


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_results(implementation, dtype):
    pixels, sizes, _ = some_crops([(30, 20), (9, 9)])
    levels = crop_resize(pixels, sizes, (12, 12), implementation=implementation)
    scale, shift = (0.01, 0.02, 0.03), (-1.0, 0.0, 2.0)
    options = {"normalise": (scale, shift), "dtype": dtype, "implementation": implementation}
    images = crop_resize(pixels, sizes, (12, 12), **options)
    expected = levels.float() * torch.tensor(scale)[:, None, None] + torch.tensor(shift)[:, None, None]
    assert images.dtype == dtype and not images.requires_grad
    torch.testing.assert_close(images, expected.to(dtype))


def test_the_cost_counts_bytes_and_operations():
    sizes = np.array([[20, 40], [10, 5]])
    found = cost(sizes, (10, 10), interpolation="bilinear", bytes_per_value=2)
    assert found["read_bytes"] == 3 * (800 + 50) and found["written_bytes"] == 3 * 2 * 2 * 100
    # across: 20 rows x 10 x 8 taps, 10 x 10 x 2; down: 10 x 10 x 4 and x 2; 3 colours, 2 FLOP each
    assert found["flops"] == 6 * (1600 + 200 + 400 + 200)

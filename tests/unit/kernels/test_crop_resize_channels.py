"""crop_resize of any channels and types: against an independent float64 filter, on the CPU and in the interpreter."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_kernels.crop_resize import crop_resize, crop_resize_reference
from ijepa_kernels.crop_resize.triton_channels import ChannelKernel
from ijepa_scale.data.decode import longest_sides
from tests.unit.data.deep_images import values
from tests.unit.data.test_deep_decode import antialiased
from tests.unit.kernels.kernel_harness import run

TYPES = ("uint8", "uint16", "float32")
WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
# uint8 is rounded after each pass: half a level, times the sum of a cubic's absolute weights, and half a level again
LIMITS = {"uint8": 1.5 / 255, "uint16": 1e-5, "float32": 1e-5}


def expected(crop: np.ndarray, output: tuple[int, int], interpolation: str, flip: bool) -> np.ndarray:
    """Returns (h, w, C) float64, by two products with PIL's filter. Integers are clamped, uint8 twice, as in PIL."""
    cubic = interpolation == "bicubic"
    across = antialiased(np.moveaxis(crop.astype(np.float64), 1, 0), output[1], cubic)
    across = across.clip(0, 255) if crop.dtype == np.uint8 else across
    found = antialiased(np.moveaxis(across, 0, 1), output[0], cubic)
    found = found if crop.dtype == np.float32 else found.clip(0, WHITE[crop.dtype.name])
    return found[:, ::-1] if flip else found


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3),
    output=st.tuples(st.integers(1, 30), st.integers(1, 30)), channels=st.integers(1, 16),
    dtype=st.sampled_from(TYPES), interpolation=st.sampled_from(["bilinear", "bicubic"]),
    implementation=st.sampled_from(["cpu", "reference"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_within_a_256th_of_the_range_of_a_float_reference(
    sizes, output, channels, dtype, interpolation, implementation, seed
):
    crops = [values((*size, channels), dtype, seed + number) for number, size in enumerate(sizes)]
    flip = np.arange(len(crops)) % 2 == 0
    pixels = torch.from_numpy(np.concatenate([crop.reshape(-1) for crop in crops]))
    options = {"interpolation": interpolation, "flip": flip, "channels": channels, "implementation": implementation}
    images = crop_resize(pixels, np.array(sizes), output, **options)
    assert images.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    assert images.shape == (len(crops), channels, *output)
    # uint8: on the CPU, PyTorch's integer filter may be a level off PIL's; see test_crop_resize
    limit = max(LIMITS[dtype], 2.5 / 255 if dtype == "uint8" and implementation == "cpu" else 0)
    for image, crop, flipped in zip(images, crops, flip, strict=True):
        off = np.abs(image.permute(1, 2, 0).double().numpy() - expected(crop, output, interpolation, flipped))
        assert off.max() <= limit * WHITE[dtype] and off.mean() <= WHITE[dtype] / 256


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_normalise_scales_and_shifts_each_channel(dtype, implementation):
    pixels, sizes = torch.from_numpy(values((9 * 8 * 5,), dtype)), np.array([[9, 8]])
    scale, shift = tuple(range(1, 6)), (0.5, 0.0, -1.0, 2.0, 3.0)
    options = {"channels": 5, "implementation": implementation}
    plain = crop_resize(pixels, sizes, (4, 4), **options).float()
    found = crop_resize(pixels, sizes, (4, 4), normalise=(scale, shift), **options)
    torch.testing.assert_close(found, plain * torch.tensor(scale)[:, None, None] + torch.tensor(shift)[:, None, None])
    assert crop_resize(pixels, sizes, (4, 4), dtype=torch.bfloat16, **options).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="normalise has 3 and 3 numbers; give 5 and 5"):
        crop_resize(pixels, sizes, (4, 4), normalise=((1,) * 3, (0,) * 3), **options)


def test_16_bits_have_no_levels_as_a_result():
    with pytest.raises(ValueError, match="dtype is torch.uint8; give float32 or bfloat16, or uint8 for uint8 pixels"):
        crop_resize(torch.zeros(4, dtype=torch.uint16), np.array([[2, 2]]), (1, 1), channels=1, dtype=torch.uint8)


def test_bicubic_overshoot_is_clamped_where_there_is_a_white():
    line = np.repeat([[0], [0], [65535], [65535]], 4, axis=1)[..., None]
    for dtype, low in (("uint16", 0.0), ("float32", -1.0)):
        pixels = torch.from_numpy(line.astype(dtype).reshape(-1))
        for run_it in (crop_resize, crop_resize_reference):
            found = run_it(pixels, np.array([[4, 4]]), (16, 4), channels=1, interpolation="bicubic")
            assert (found.min() < low) == (dtype == "float32") and found.min() == pytest.approx(found.min().item())
            assert (found.max() > 65535) == (dtype == "float32")


def test_the_kernel_equals_the_reference_under_the_interpreter():
    found = json.loads(run("-m", "tests.unit.kernels.interpret_crop_channels", TRITON_INTERPRET="1").splitlines()[-1])
    assert len(found) == 8
    for name, off in found.items():
        kind = name.split(", ")[0]
        assert off["of reference"] <= (1.0 / 255 if kind == "uint8" else 1e-5), (name, off)
        assert off["of float"] <= 1 / 256, (name, off)


COMPILE = """
import json
from ijepa_kernels.crop_resize.triton_channels import _kernel
from tests.unit.kernels.kernel_harness import compiled
found = []
for pixels, channels, cubic in (("u16", 13, False), ("fp32", 1, True), ("u8", 4, True)):
    signature = {"pixels": f"*{pixels}", "crops": "*i64", "factors": "*fp32", "out": "*fp32", "out_height": "i32",
                 "out_width": "i32"}
    constants = {"CHANNELS": channels, "LEVELS": pixels == "u8", "CLAMPED": pixels == "u16", "TAPS": 8,
                 "CUBIC": cubic, "TILE": 32, "ROWS": 16}
    found += compiled(_kernel, signature, constants, num_warps=4).values()
print(json.dumps(found))
"""


def test_the_kernel_compiles_for_gpus_without_spills(tmp_path):
    found = json.loads(run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    assert len(found) == 6 and all(spilled == 0 and registers > 0 for registers, spilled, _ in found)


def test_the_warm_up_compiles_every_variant_that_crops_can_need(monkeypatch):
    from ijepa_kernels.crop_resize import triton_channels

    variants = set()

    class Kernel:
        def __getitem__(self, grid):
            return lambda pixels, *_, TAPS, **__: variants.add((TAPS, pixels.data_ptr() % 16 == 0))

    monkeypatch.setattr(triton_channels, "_kernel", Kernel())
    kernel, output, ratio = ChannelKernel(5, torch.uint16), (32, 48), (3 / 4, 4 / 3)
    options = {"interpolation": "bicubic", "dtype": torch.float32, "normalise": ((1.0,) * 5, (0.0,) * 5)}
    sides = longest_sides(output, ratio)
    kernel.warm_up(output, sides, **options, device=torch.device("cpu"))
    warm = frozenset(variants)
    variants.clear()
    for height, width in np.random.default_rng(0).integers(1, sides, (200, 2)):
        for begin in (0, 1):
            flat = torch.zeros(height * width * 5 + 8, dtype=torch.uint16)[begin : begin + height * width * 5]
            kernel.crop_resize(flat, np.array([[height, width]]), output, **options, flip=None)
    assert len({taps for taps, _ in variants}) > 1 and variants <= warm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_full_size_on_a_gpu(dtype, channels):
    sizes = np.random.default_rng(0).integers(1, 300, (16, 2))
    pixels = torch.from_numpy(values((int(sizes.prod(axis=1).sum()) * channels,), dtype)).cuda()
    options = {"channels": channels, "interpolation": "bicubic", "flip": np.arange(16) % 2 == 0}
    wanted = crop_resize(pixels, sizes, (224, 224), implementation="reference", **options)
    off = (crop_resize(pixels, sizes, (224, 224), **options).float() - wanted.float()).abs()
    assert off.max() <= (1 if dtype == "uint8" else 1e-5 * WHITE[dtype] * 10)

"""The Triton kernel: against the reference under the interpreter, and compiled for GPUs that aren't there."""

import json

import pytest
import torch

from tests.unit.kernels.kernel_harness import CAPABILITIES, run

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ijepa_kernels.crop_resize.triton import _kernel
constants = {{"TAPS": 8, "CUBIC": {cubic}, "TILE": 32, "ROWS": 16}}
factors = [f"{{kind}}_{{colour}}" for kind in ("scale", "shift") for colour in "rgb"]
signature = {{"pixels": "*u8", "crops": "*i64", "out": "{kind}", "out_height": "i32", "out_width": "i32",
             **dict.fromkeys(factors, "fp32"), **dict.fromkeys(constants, "constexpr")}}
source = ASTSource(fn=_kernel, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options={{"num_warps": 4}})
print(len(compiled.asm["cubin"]))
"""


def test_the_kernel_equals_the_reference_under_the_interpreter():
    found = json.loads(run("-m", "tests.unit.kernels.interpret_crop_resize", TRITON_INTERPRET="1").splitlines()[-1])
    assert len(found) == 12
    for name, off in found.items():
        # sums in another order tip ties of the rounding, which small whole ratios make common
        assert off["levels"] <= 1 and off["share"] < 0.01, (name, off)
        assert off["normalised"] < 1e-6, (name, off)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_compiles(capability, tmp_path):
    for kind, cubic in (("*bf16", False), ("*fp32", True), ("*u8", False)):
        text = COMPILE.format(capability=capability, kind=kind, cubic=cubic)
        assert int(run("-c", text, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1]) > 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_full_size_on_a_gpu(interpolation):
    import numpy as np

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

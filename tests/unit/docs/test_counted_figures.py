"""Figures that pages count instead of measuring are those of the formulas."""

from __future__ import annotations

from pages import DOCS, ROOT, text_of

from ijepa_scale.config import load_config
from ijepa_scale.evaluate.linear_probe import LARGER_RATES, sweep
from ijepa_scale.planning.flops import encoder_forward_flops

IMAGES = 1_281_167 + 50_000  # of ImageNet-1k, for training and for validation


def test_what_the_linear_probe_of_imagenet_computes() -> None:
    page = " ".join(text_of(DOCS / "evaluation.md").split())
    flops = encoder_forward_flops(load_config(ROOT / "configs" / "in1k_vith14_ep300.yaml").model)
    assert f"all {IMAGES:,} training and test images" in page
    assert f"{2 * IMAGES / 1e6:.2f} million forwards of {flops / 1e12:.2f} TFLOP" in page
    assert f"each, {2 * IMAGES * flops / 1e18:.2f} × 10^18 FLOPs" in page
    assert f"last four blocks take {IMAGES * 4 * 1280 * 4 / 1e9:.0f} GB for each encoder" in page
    assert f"trains {len(sweep()) + len(sweep(LARGER_RATES))} linear layers" in page

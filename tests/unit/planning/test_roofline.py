"""The estimate of MFU from products, attention and memory traffic."""

from __future__ import annotations

import dataclasses

import pytest

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning import roofline
from ijepa_scale.planning.devices import Cluster, find_device
from ijepa_scale.planning.plan import FP32_MFU, Plan, plan
from ijepa_scale.planning.plan_text import plan_text
from ijepa_scale.planning.roofline import Reach

H100, H200, A100 = map(find_device, ("h100", "h200", "a100-80gb"))


def huge(*overrides: str) -> PretrainConfig:
    return load_config("configs/in1k_vith14_ep300.yaml", overrides)


def mfu(device_name: str, *overrides: str) -> tuple[float, float]:
    return planned(device_name, *overrides).chosen.mfu


def planned(device_name: str, *overrides: str) -> Plan:
    return plan(huge(*overrides), Cluster(find_device(device_name), 16))


def test_the_estimate_agrees_with_a_separate_roofline() -> None:
    """Ranges of H/14 at 224 with 128 images, from a separate calculation with the same assumptions."""
    for name, (low, high) in {"h100": (0.38, 0.43), "h200": (0.42, 0.48), "a100-80gb": (0.54, 0.60)}.items():
        found = mfu(name)
        assert found == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))


def test_perfect_kernels_and_memory_reach_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little more: MFU counts whole last blocks, of which a part isn't computed; padded heads cost some."""
    monkeypatch.setattr(roofline, "_REACH", {})
    monkeypatch.setattr(roofline, "_OTHERS", Reach(wide=(1, 1), narrow=(1, 1), attention=(1, 1)))
    monkeypatch.setattr(roofline, "_BACKWARD", 1.0)
    device = dataclasses.replace(H100, memory_bandwidth=1e30)
    low, high = plan(huge(), Cluster(device, 16)).chosen.mfu
    assert low == high and 0.97 < low < 1.05


def test_what_makes_a_step_slower_lowers_the_estimate() -> None:
    compiled = sum(mfu("h200"))
    assert sum(mfu("h200", "engine.compile=false")) < compiled
    assert sum(mfu("h200", "engine.checkpointing=selective")) < compiled
    assert sum(mfu("h200", "engine={strategy: ddp, target_precision: fp8}")) > sum(mfu("h200", "engine.strategy=ddp"))
    assert sum(mfu("h200", "engine.strategy=fsdp2")) > sum(mfu("h200", "engine.strategy=ddp"))  # each updates a share
    assert sum(mfu("h200", "engine.accumulation=4")) < compiled  # shorter products cast the same weights
    assert sum(mfu("h200", "optimizer.impl=fused_tail")) > compiled  # fewer casts, and one pass over the weights
    assert sum(mfu("h100")) < compiled  # less bandwidth, the same peak


@pytest.mark.parametrize(
    ("gpu", "change", "reason"),
    [
        ("a100-80gb", [], "a100-80gb has no fp8 products"),
        ("h100", ["engine.compile=false"], r"blocks aren't compiled \(engine.compile is false\)"),
        ("h100", ["engine.strategy=fsdp2"], "fsdp2 shards the target and gathers it in bf16"),
    ],
)
def test_an_fp8_target_that_training_refuses_is_refused(gpu: str, change: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"target_precision is fp8 but {reason}; set engine.target_precision=null"):
        planned(gpu, "engine.strategy=ddp", "engine.target_precision=fp8", *change)


def test_a_given_share_and_fp32_are_said() -> None:
    given, exact = plan(huge(), Cluster(H100, 16), mfu=0.3), planned("h100", "engine.precision=fp32")
    assert given.chosen.mfu == (0.3, 0.3) and exact.chosen.mfu == (FP32_MFU, FP32_MFU)
    assert "30% of the peak (from --mfu, not measured)" in page(given)
    assert "50% of the peak (assumed, not measured)" in page(exact)
    estimated = "estimated for compiled blocks, not measured; --mfu replaces it"
    assert estimated in page(planned("h100"))


def page(found: Plan) -> str:
    return plan_text(found).replace("\n" + 11 * " ", " ")

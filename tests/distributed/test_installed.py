"""The wheel trains outside a checkout, under every launcher, as the checkout does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ijepa_scale.environment import child_environment, free_port
from tests.unit.installed import ROOT, build, copy_checkout, environment_with, run_in
from tests.versions import LARGEST_DIFFERENCE, RUNS, SETTINGS, losses


@pytest.mark.long
def test_a_wheel_trains_in_a_clean_environment_as_the_checkout_does(tmp_path: Path) -> None:
    wheel = build("wheel", copy_checkout(tmp_path / "tree"), tmp_path / "dist")
    python = environment_with(wheel, tmp_path / "environment")
    there = tmp_path / "elsewhere"
    there.mkdir()
    accelerator = {"DS_ACCELERATOR": "cpu"}
    script = ROOT / "launch" / "pretrain.py"
    run_in(
        there,
        sys.executable,
        script,
        *SETTINGS,
        "folder=checkout",
        PYTHONPATH=child_environment().get("PYTHONPATH", ""),
    )
    expected = losses(there / "checkout")
    assert len(expected) == 4

    done = run_in(there, python.with_name("ijepa"), "pretrain", *SETTINGS, "folder=one")
    assert losses(there / "one") == expected and "ijepa export one --to encoder.safetensors" in done.stdout
    run_in(there, python.with_name("ijepa"), "pretrain", *SETTINGS, "folder=two", "--processes", "2")
    for name, (flag, launcher, *words) in RUNS.items():
        port = [f"--master_port={free_port()}"] if launcher.startswith("deepspeed") else []
        run_in(there, python, flag, launcher, *port, *words, f"folder={name}", **accelerator)
    for name in ("two", *RUNS):
        assert losses(there / name) == pytest.approx(expected, abs=LARGEST_DIFFERENCE), name
    run_in(there, python.with_name("ijepa"), "embed", "nothing.jpg", "--model", "one", "--to", "a.npy", code=2)

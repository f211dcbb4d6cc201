"""Training still gives the recorded results, and recorded checkpoints resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run
from tests.golden import record

# For losses and gradient norms on other machines: absolute below 1, relative above.
TOLERANCE, BF16_TOLERANCE = 1e-6, 5e-3  # the last fp32 bit may decide between bf16 neighbours, 2^-8 apart
CURVES = json.loads((record.HERE / "curves.json").read_text())
BATCHES = json.loads((record.HERE / "batches.json").read_text())
SAME_MACHINE = CURVES["machine"] == record.machine()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record.write_images(tmp_path_factory.mktemp("golden") / "data")


def close(found: list[float], expected: list[float], tolerance: float = TOLERANCE) -> bool:
    return found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_the_files_hold_every_case() -> None:
    assert set(CURVES["cases"]) == set(record.CASES)
    for case in CURVES["cases"].values():
        assert len(case["losses"]) == record.STEPS and len(set(case["losses"])) > record.STEPS // 2


@pytest.mark.parametrize("name", record.CASES)
def test_training_gives_the_recorded_results(name: str, data: Path, tmp_path: Path) -> None:
    found, expected = record.curve(name, tmp_path, data), CURVES["cases"][name]
    if SAME_MACHINE:
        assert found == expected
        return
    tolerance = BF16_TOLERANCE if "bf16" in name else TOLERANCE
    for curve in ("losses", "grad_norms"):
        assert close(found[curve], expected[curve], tolerance)
    for kind in record.KINDS:
        assert found["state"][kind]["tensors"] == expected["state"][kind]["tensors"]
        assert found["state"][kind]["norm"] == pytest.approx(expected["state"][kind]["norm"], rel=1e-4)


def test_samples_crops_and_masks_are_the_recorded_ones(data: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = record.batches(tmp_path, data)
    assert found["batches"] == BATCHES["batches"]  # PNG decodes to the same pixels everywhere
    assert found["masks"] == BATCHES["masks"]


@pytest.mark.parametrize("name", record.CHECKPOINTS)
def test_a_checkpoint_of_the_first_version_resumes(name: str, tmp_path: Path) -> None:
    path = record.config_file(name, tmp_path, tmp_path)
    shutil.copytree(record.HERE / f"{name}-checkpoint", tmp_path / name / "checkpoints")
    overrides = (*record.CHECKPOINTS[name], *record.ENGINES["plain"][1])
    run(record.train, 1, str(path), overrides, alone=True)
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses, expected = [row["loss"] for row in rows if "loss" in row], CURVES["resumed"][name]["losses"]
    assert len(losses) == record.STEPS - 10
    assert losses == expected if SAME_MACHINE else close(losses, expected)

"""A dense evaluation gives the same table on any number of processes, and every process refuses bad data alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.dense.dense_evaluation import evaluate_dense
from ijepa_scale.evaluate.dense.dense_protocols import Measure
from ijepa_scale.evaluate.offline import EvaluationRequest
from ijepa_scale.models.registry import build_encoder
from tests.distributed.harness import run


@pytest.fixture
def request_of_boxes(tmp_path: Path) -> EvaluationRequest:
    """An evaluation on 13 photographs with masks, and 7 held-out ones: bright boxes on dark ground."""
    built = build_encoder("vit_tiny", image_size=16, patch_size=4, width=24, depth=2, heads=3, seed=3)
    save_file(built.state_dict(), tmp_path / "encoder.safetensors")
    generator = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 7)):
        for number in range(count):
            mask = np.zeros((18, 20), dtype=np.uint8)
            top, left = generator.integers(0, 9, 2)
            mask[top : top + 9, left : left + 9] = 1
            pixels = generator.integers(0, 120, (18, 20, 3)) + 120 * mask[..., None]
            for folder, values in (("images", pixels), ("masks", mask)):
                path = tmp_path / split / folder / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(path)
    return EvaluationRequest(
        source=str(tmp_path / "encoder.safetensors"), train=str(tmp_path / "train"), test=str(tmp_path / "val"),
        protocols=("segmentation", "patch-knn"), epochs=8, workers=0, batch_size=2, image_size=16, heads=3,
        folder=tmp_path / "to",
    )  # fmt: skip


def measures(world: World, request: EvaluationRequest) -> tuple[list[Measure], list[Measure]] | str | None:
    try:
        results = evaluate_dense(request, world)
    except DataError as error:
        return str(error)
    return None if results is None else (results.measures, results.untrained)


def test_the_table_is_the_same_on_any_number_of_processes(request_of_boxes: EvaluationRequest, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2, 3):
        request = dataclasses.replace(request_of_boxes, folder=tmp_path / str(processes))
        first, *others = run(measures, processes, request)
        assert others == [None] * (processes - 1)
        found.append(first)
    assert found[0] == found[1] == found[2]
    best = {each.protocol: each.value for each in found[0][0] if each.measure == "mIoU"}
    assert min(best.values()) > 0.6  # brightness shows even at random weights


def test_every_process_refuses_a_bad_mask(request_of_boxes: EvaluationRequest, tmp_path: Path) -> None:
    Image.new("RGB", (20, 18)).save(tmp_path / "val" / "masks" / "6.png")
    first, second = run(measures, 2, request_of_boxes)
    assert first == second and "test: 1 of 7 pairs can't be used" in first and "a mask of colours" in first

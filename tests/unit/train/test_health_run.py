"""Health in whole runs: collapses raise the alarm, healthy runs none, and a run that goes on measures the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CollapseError, DataError
from ijepa_scale.train.pretrain import pretrain

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
CONFIG = """
folder: {folder}/run
model: {{name: vit_tiny, image_size: 32, patch_size: 4, width: 32, depth: 1, heads: 2, predictor_width: 16,
  predictor_depth: 1}}
masks: {{min_keep: 3, group_size: 16}}
data: {{reader: imagefolder, train: {folder}/images, batch_size: 16, workers: 0}}
augment: {{mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}
schedule: {{epochs: 5, warmup_epochs: 1, steps_per_epoch: 20, momentum: [0.996, 1.0]}}
engine: {{device: cpu, strategy: plain, precision: fp32}}
logging: {{every: 10, tensorboard: false, progress: none}}
checkpoint: {{every: 0}}
health: {{every: 10, images: 48}}
"""
COLLAPSES = {
    "momentum 0": ("schedule.momentum=[0.0,0.0]", "optimizer.lr=3e-3"),
    "learning rate 1": ("optimizer.lr=1.0", "optimizer.start_lr=1.0"),
    "images all the same": ("data.train={folder}/same", "schedule.stop_after=20"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of smooth random images, and one of equal ones."""
    folder = tmp_path_factory.mktemp("health")
    generator = np.random.default_rng(0)
    for name in ("images", "same"):
        (folder / name).mkdir()
        for number in range(64):
            small = generator.integers(0, 256, (4, 4, 3)) if name == "images" else np.full((4, 4, 3), 120)
            image = Image.fromarray(small.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number:02d}.png")
    return folder


def configured(data: Path, tmp_path: Path, *overrides: str) -> PretrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=data))
    given = [each.format(folder=data) for each in overrides]
    return load_config(path, [f"folder={tmp_path / 'run'}", *given])


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "rank_me" in row]


@pytest.mark.parametrize("name", [name for name in COLLAPSES if name != "learning rate 1"])  # that one is below
def test_a_collapse_raises_the_alarm_once(
    name: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pretrain(configured(data, tmp_path, *COLLAPSES[name]), WORLD)
    said = [record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()]
    assert len(said) == 1, said
    assert ("optimizer.lr" in said[0]) == ("same" not in name) and ("masks.png" in said[0])
    assert any(row["alarm"] for row in rows(tmp_path))


@pytest.mark.parametrize("changes", [("optimizer.lr=2e-3",), ("masks.context=packed", "seed=2")])
def test_a_healthy_run_raises_none(
    changes: tuple[str, ...], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pretrain(configured(data, tmp_path, "schedule.stop_after=60", *changes), WORLD)
    assert "collapsing" not in caplog.text
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(0, 61, 10))
    assert not any(row["alarm"] for row in found)
    assert found[-1]["relative_loss"] < found[0]["relative_loss"]
    norms = [name for name in found[-1] if name.startswith("grad_norm_")]
    assert sorted(norms) == [f"grad_norm_{part}_{n}" for part in ("encoder", "predictor") for n in ("0", "rest")]
    assert not any(name.startswith("grad_norm_") for name in found[0])  # no step was taken yet


def test_on_collapse_stop_ends_the_run_before_its_state_is_saved(data: Path, tmp_path: Path) -> None:
    settings = ("health.on_collapse=stop", "checkpoint.every=10", *COLLAPSES["learning rate 1"])
    with pytest.raises(
        CollapseError, match=r"^step (\d+): features are collapsing: .*health.on_collapse=warn"
    ) as ended:
        pretrain(configured(data, tmp_path, *settings), WORLD)
    step = int(str(ended.value).split(":")[0].removeprefix("step "))
    saved = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert rows(tmp_path)[-1]["step"] == step and max(saved) < step


def test_a_run_that_goes_on_measures_what_it_would_have(data: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    settings = ("schedule.stop_after=40", "health.keep_best=rank_me", *COLLAPSES["momentum 0"])
    whole = pretrain(configured(data, folders[0], *settings), WORLD)
    for stop in ("schedule.stop_after=25", "schedule.stop_after=40"):
        broken = pretrain(configured(data, folders[1], *settings, stop), WORLD)
    assert whole.loss == broken.loss
    found = rows(folders[1])
    assert [row for row in found if row["step"] != 25] == rows(folders[0])  # 25 was its end
    best = [list((folder / "run" / "best").iterdir()) for folder in folders]
    chosen = max(found[1:], key=lambda row: row["rank_me"] * (not row["alarm"]))
    assert [path.name for path in best[1]] == [f"step-{chosen['step']:08d}"]


def test_measuring_changes_no_number_of_the_training(data: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("with", "without")]
    losses = []
    for folder, every in zip(folders, (5, 0), strict=True):
        folder.mkdir()
        pretrain(configured(data, folder, "schedule.stop_after=20", f"health.every={every}"), WORLD)
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        losses.append([(row["step"], row["loss"], row["grad_norm"]) for row in lines if "loss" in row])
    assert losses[0] == losses[1] and rows(folders[0]) and not rows(folders[1])


def test_images_that_cannot_be_read_are_left_out_and_named(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for path in sorted((data / "images").iterdir())[:6]:
        (held_out / path.name).write_bytes(path.read_bytes())
    (held_out / "03.png").write_bytes(b"no image")
    settings = (f"health.data={held_out}", "health.reader=imagefolder", "schedule.stop_after=1")
    with caplog.at_level(logging.INFO):
        pretrain(configured(data, tmp_path, *settings), WORLD)
    assert "health leaves out 1 of 6 images of health.data: " in caplog.text and "03.png" in caplog.text
    assert "health is measured on 5 fixed images of health.data every 10 steps" in caplog.text


def test_a_stream_is_told_that_it_needs_images_of_its_own(data: Path, tmp_path: Path, caplog: Any) -> None:
    from ijepa_scale.train.health import RunHealth

    config = configured(data, tmp_path, "evaluate.every=0")
    health = RunHealth(config, 0, 100)
    health.open(object.__new__(StreamSource), None, WORLD, 16)  # type: ignore[arg-type]
    assert "health isn't measured: the images of data.train can't be read in any order" in caplog.text
    assert not health.is_due(0)


def test_images_that_are_not_there_are_named_by_their_setting(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^health\.data can't be used: .*/nowhere"):
        pretrain(configured(data, tmp_path, f"health.data={tmp_path}/nowhere"), WORLD)

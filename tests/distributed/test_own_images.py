"""The one command for one's own images: it chooses, says so, and continues with what it chose."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.distributed.commands import ROOT, finish, losses, start

SMALL = (
    "model.width=24", "model.depth=1", "model.predictor_width=24", "model.predictor_depth=1", "model.image_size=32",
    "engine.device=cpu", "logging.every=1", "logging.tensorboard=false", "data.workers=0",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 40 photographs of mixed sizes."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(40):
        height, width = generator.integers(40, 70, size=2)
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height))).save(
            folder / ("more" if number % 2 else ".") / f"{number}.jpg"
        )
    return folder


@pytest.mark.long
def test_a_run_begun_on_two_processes_goes_on_with_its_choices_on_one(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    shutil.copy(ROOT / "configs" / "own_images.yaml", config)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    words = [f"data.train={photos}", *SMALL]
    log = finish(start(config, "--processes", "2", f"folder={cut}", "schedule.stop_after=3", *words), config)
    assert "chosen: data.batch_size=4: a power of two of which an epoch of 40 images has ten or more" in log
    assert f"--model {cut} --to features.npy" in log
    first = yaml.safe_load((cut / "config.yaml").read_text())
    assert first["recipe"] is None and first["masks"]["group_size"] == 2
    assert {line.partition("=")[0] for line in first["chosen_by_recipe"]} >= {"optimizer.lr", "schedule.epochs"}
    finish(start(config, f"folder={cut}", "schedule.stop_after=6", f"data.train={photos}"), config)
    second = yaml.safe_load((cut / "config.yaml").read_text())
    assert second["model"] == first["model"] and second["logging"] == first["logging"]  # given at the first start only
    assert second["chosen_by_recipe"] == first["chosen_by_recipe"] and second["masks"] == first["masks"]
    kept = tmp_path / "kept.yaml"
    shutil.copy(cut / "config.yaml", kept)  # a run's configuration starts the same run again
    finish(start(kept, f"folder={whole}", "engine.strategy=auto"), kept)
    found, expected = losses(cut), losses(whole)
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    assert np.allclose(list(found.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "data.train is null; name your images"),
        (("recipe=mine",), "recipe is 'mine'; choose own_images, or null"),
        (("data.train=PHOTOS", "model.name=vit_bse"), "did you mean vit_base"),
        (("data.train=PHOTOS", "folder=PHOTOS/run"), "so the run's pictures would join its images"),
        (("data.train=PHOTOS/0.jpg",), "is one image; give the folder that it is in"),
    ],
)  # fmt: skip
def test_what_it_cant_begin_with_is_said(photos: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    config = tmp_path / "own.yaml"
    shutil.copy(ROOT / "configs" / "own_images.yaml", config)
    given = [word.replace("PHOTOS", str(photos)) for word in words]
    log = finish(start(config, f"folder={tmp_path / 'run'}", *given, "engine.device=cpu"), config, code=2)
    assert said in log and "Traceback" not in log and log.count("error (process") == 1


def test_a_recipe_needs_a_run(tmp_path: Path) -> None:
    plan = ("--gpus", "h100")
    config = tmp_path / "own.yaml"
    shutil.copy(ROOT / "configs" / "own_images.yaml", config)
    log = finish(start(config, *plan, script=ROOT / "launch" / "plan.py"), config, code=2)
    assert "recipe is own_images, which chooses settings by the images and the machine when a run begins" in log

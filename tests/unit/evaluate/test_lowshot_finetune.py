"""Low-shot finetuning: the published recipe, the subsets it is given, and runs that are done once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ijepa_scale.config import load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate import lowshot_finetune as module
from ijepa_scale.evaluate.labelled_sets import LabelledSet, Named
from ijepa_scale.evaluate.lowshot_finetune import (
    FinetuneRequest,
    check_subsets,
    lowshot_config,
    lowshot_finetune,
    parse_subset,
)
from ijepa_scale.models.registry import build_encoder

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
CONFIGS = Path(__file__).parents[3] / "configs" / "finetune"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledSet:
    """Images of 2 classes told apart by brightness, 40 to train and 20 to test."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20)):
        for number in range(count):
            path = folder / split / f"class{number % 2}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (16, 16, 3)) + 190 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return LabelledSet.open(Named("", str(folder / "train"), str(folder / "val")), None, "ignore", log=False)


@pytest.fixture
def request_(tmp_path: Path) -> FinetuneRequest:
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=3, seed=3)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    return FinetuneRequest(
        source=str(tmp_path / "encoder.safetensors"), which="target", digest="0", width=24, image_size=(16, 16),
        heads=3,
        folder=tmp_path / "to", subsets=("5",), seeds=2, epochs=2, workers=0,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "width"), [("lowshot1_vith14", 1280), ("lowshot1_vitl16", 1024)])
def test_one_percent_of_imagenet_gets_the_published_recipe(data, request_, name, width):
    request = dataclasses.replace(request_, width=width, epochs=50)
    found = lowshot_config(data, request, Path("1percent.txt"), 12_811, seed=0, processes=8)
    published = load_config(CONFIGS / f"{name}.yaml", kind=FinetuneConfig)
    assert found.optimizer.values() == published.optimizer.values()
    assert found.augment.values() == published.augment.values()
    assert found.data.batch_size == published.data.batch_size == 512
    assert found.model.drop_path == published.model.drop_path == 0.0
    assert found.model.pool_norm == published.model.pool_norm


@pytest.mark.parametrize(
    ("count", "processes", "batch", "accumulation"),
    [(600, 1, 32, 1), (12_811, 1, 512, 8), (12_811, 3, 510, 5), (10, 4, 8, 1), (2, 4, 4, 1), (5000, 2, 200, 2)],
)
def test_a_batch_is_shared_by_processes_and_fits_them(data, request_, count, processes, batch, accumulation):
    found = lowshot_config(data, request_, Path("x"), count, seed=0, processes=processes)
    assert (found.data.batch_size, found.engine.accumulation) == (batch, accumulation)


def test_runs_give_a_score_and_are_done_once(data, request_, monkeypatch):
    (first,) = lowshot_finetune(data, request_, ALONE, trained=True)
    assert first.protocol == "5-shot, finetuned" and first.setting == "10 images, 2 seeds, 2 epochs"
    assert first.low <= first.accuracy <= first.high and (first.accuracy * 40) % 1 == pytest.approx(0)
    subsets = sorted((request_.folder / "subsets").iterdir())
    assert [path.name for path in subsets] == ["5-shot-seed0.txt", "5-shot-seed1.txt"]
    assert subsets[0].read_text() != subsets[1].read_text() and len(subsets[0].read_text().split()) == 10
    assert len(list((request_.folder / "finetuned").iterdir())) == 2  # no checkpoints are left
    runs: list[Any] = []
    real = module.finetune
    monkeypatch.setattr(module, "finetune", lambda *given: runs.append(given[0]) or real(*given))
    assert lowshot_finetune(data, request_, ALONE, trained=True) == [first] and not runs
    of_file = dataclasses.replace(request_, subsets=(str(subsets[0]),), seeds=1)
    (score,) = lowshot_finetune(data, of_file, ALONE, trained=False)
    assert score.protocol == "5-shot-seed0 low-shot, finetuned" and len(runs) == 1
    assert runs[0].model.init is None and runs[0].model.encoder.width == 24  # the same sizes at random weights


@pytest.mark.parametrize("text", ["0", "0%", "101%", "x%", "nowhere.txt", ""])
def test_what_is_no_subset_is_refused(text):
    with pytest.raises(ConfigError, match="give a share like 1%, images per class like 5, or a text file"):
        parse_subset(text, np.arange(4) % 2)


@pytest.mark.parametrize(("text", "said"), [("21", "class 0 has 20 images, fewer than 21"), ("LIST", "names no")])
def test_subsets_that_cant_be_drawn_are_refused_before_anything_is_trained(data, tmp_path, text, said):
    if text == "LIST":
        (tmp_path / "list.txt").write_text("no-such-image.png\n")
        text = str(tmp_path / "list.txt")
    check_subsets(data, ("1%", "5"), 0)
    with pytest.raises(DataError, match=said):
        check_subsets(data, ("1%", text), 0)


def test_shares_and_shots_are_drawn_of_each_class():
    labels = np.repeat([0, 1], [400, 100])
    for text, counts in (("1%", [4, 1]), ("10%", [40, 10]), ("5", [5, 5]), ("0.5%", [2, 1])):
        draw = parse_subset(text, labels).draw
        assert draw is not None and np.bincount(labels[draw(0)]).tolist() == counts
        assert draw(0).tolist() != draw(1).tolist()

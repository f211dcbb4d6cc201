"""Runs on labels that are names, on images to be turned, and what a run that continues must agree in."""

from __future__ import annotations

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_scale.checkpoint import store
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.data.decode import decode
from ijepa_scale.data.sources import tar_shards
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, DataError
from ijepa_scale.evaluate.predictions import ImageClassifier
from ijepa_scale.train.finetune import finetune
from ijepa_scale.train.pretrain import pretrain
from launch import shards

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
COLORS = {"blue": (30, 40, 220), "green": (20, 200, 60), "red": (220, 30, 30)}
ENGINE = "engine: {device: cpu, precision: fp32, strategy: plain}"
FINETUNE = f"""
model:
  encoder: {{name: vit_tiny, image_size: 16, patch_size: 4, width: 24, depth: 1, heads: 2}}
  num_classes: 3
data: {{batch_size: 6, workers: 0}}
augment: {{crop_scale: [0.5, 1.0], rand_augment: null, random_erasing: 0.0, mixup: 0.0, cutmix: 0.0}}
optimizer: {{lr: 1e-3}}
schedule: {{epochs: 2, warmup_epochs: 0}}
{ENGINE}
logging: {{every: 5, tensorboard: false, progress: none}}
evaluate: {{batch_size: 7, workers: 0}}
"""
PRETRAIN = f"""
model: {{name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 1, heads: 2, predictor_width: 12,
  predictor_depth: 1}}
masks: {{min_keep: 3, group_size: 4}}
data: {{batch_size: 6, workers: 0}}
schedule: {{epochs: 2, warmup_epochs: 0}}
{ENGINE}
logging: {{every: 1, tensorboard: false, progress: none}}
evaluate: {{every: 0}}
"""


def write(folder, labels, per_class=4):
    """Writes shards as another tool would: no index, no manifest, no class list."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(3 * per_class):
            noise = np.random.default_rng(number).integers(-25, 25, (20, 20, 3))
            pixels = (np.array(list(COLORS.values())[number % 3]) + noise).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("cls", labels[number % 3].encode())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def configured(tmp_path, kind, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(FINETUNE if kind is FinetuneConfig else PRETRAIN)
    return load_config(path, [f"folder={tmp_path / 'run'}", *overrides], kind=kind)


def test_names_are_pretrained_on_and_numbered_for_finetuning(tmp_path, caplog):
    train, test = write(tmp_path / "train", list(COLORS)), write(tmp_path / "test", ['"blue"', " green ", "red"])
    on = (f"data.train={train}", f"evaluate.test={test}")
    pretrain(configured(tmp_path, PretrainConfig, on[0], f"folder={tmp_path / 'pre'}"), ALONE)
    with pytest.raises(DataError, match="has the label 'blue', but there is no .*train/classes.json that"):
        finetune(configured(tmp_path, FinetuneConfig, *on), ALONE)
    assert shards.main(["classes", str(train)]) == 0
    result = finetune(configured(tmp_path, FinetuneConfig, *on), ALONE)
    assert result.top1 is not None and ImageClassifier(tmp_path / "run").classes == list(COLORS)
    assert "compared by number only" not in caplog.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == 12
    (train / "classes.json").write_text('["red", "green", "blue"]')
    with pytest.raises(CheckpointError, match="labels was [0-9a-f]{16}, is [0-9a-f]{16}"):
        finetune(configured(tmp_path, FinetuneConfig, *on, "schedule.epochs=3", "schedule.warmup_epochs=0"), ALONE)


def test_a_run_is_continued_with_the_same_pixels_only(tmp_path, caplog):
    on = f"data.train={write(tmp_path / 'train', list(COLORS))}"
    pretrain(configured(tmp_path, PretrainConfig, on, "schedule.stop_after=1"), ALONE)
    for setting, before in (("data.exif=apply", "exif was ignore"), ("data.decode_scaling=dct", "scaling was none")):
        with pytest.raises(CheckpointError, match=f"data.*{before}, is {setting.partition('=')[2]}"):
            pretrain(configured(tmp_path, PretrainConfig, on, setting), ALONE)
    assert "reduced scale" not in caplog.text


def test_a_checkpoint_without_these_settings_is_continued_with_a_warning(tmp_path, caplog, monkeypatch):
    on = f"data.train={write(tmp_path / 'train', list(COLORS))}"
    waiting = "checkpoint.asynchronous=false"
    real = store.save

    def older(*arguments, extra, **options):
        identity = {
            name: value for name, value in extra["identity"].items() if not name.startswith(("data.e", "data.d"))
        }
        return real(*arguments, extra={**extra, "identity": identity}, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save", older)
        patch.setattr(store, "amend", lambda *_: None)
        pretrain(configured(tmp_path, PretrainConfig, on, "schedule.stop_after=1", waiting), ALONE)
    caplog.set_level(logging.WARNING)
    pretrain(configured(tmp_path, PretrainConfig, on), ALONE)
    assert "from a version that read crops over twice the image size at reduced scale; now they are read" in caplog.text


def test_a_run_warns_once_and_goes_on(tmp_path, caplog):
    train = write(tmp_path / "train", ["0", "0", "0"])
    pretrain(configured(tmp_path, PretrainConfig, f"data.train={train}", "augment.mean=[124, 116, 104]"), ALONE)
    for text in ("all 12 images have the label 0: check that data.train", "check augment.mean 124, 116, 104 and"):
        assert caplog.text.count(text) == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").exists()


def test_prediction_turns_photographs(tmp_path):
    train = write(tmp_path / "train", ["0", "1", "2"])
    finetune(configured(tmp_path, FinetuneConfig, f"data.train={train}"), ALONE)
    classifier = ImageClassifier(tmp_path / "run")
    halves = Image.fromarray(np.repeat(np.array([[[250, 0, 0], [0, 0, 250]]], np.uint8), 16, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    halves.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(decode((tmp_path / "turned.png").read_bytes(), "apply")).save(tmp_path / "upright.png")
    halves.save(tmp_path / "lying.png")
    turned, upright, lying = (classifier.load(tmp_path / f"{name}.png") for name in ("turned", "upright", "lying"))
    assert torch.equal(turned, upright) and not torch.equal(turned, lying)


@pytest.mark.parametrize("verify", ["size", "first_open"])
def test_evaluation_sets_are_compared_as_training_sets_are(tmp_path, monkeypatch, verify):
    made = []

    class Counted(tar_shards.HashedShards):
        def __init__(self):
            super().__init__()
            made.append(1)

    monkeypatch.setattr(tar_shards, "HashedShards", Counted)
    sets = [str(write(tmp_path / name, "012")) for name in ("a", "b", "c", "d")]
    settings = (f"data.train={sets[0]}", f"data.verify={verify}")
    measured = (f"evaluate.train={sets[1]}", f"evaluate.test={sets[2]}", "evaluate.every=4", "evaluate.batch_size=4")
    healthy = (f"health.data={sets[3]}", "health.every=4", "health.images=8", "health.reader=shards")
    pretrain(configured(tmp_path, PretrainConfig, *settings, *measured, *healthy), ALONE)
    assert len(made) == (4 if verify == "first_open" else 0)
    finetune(configured(tmp_path, FinetuneConfig, *settings, f"evaluate.test={sets[1]}", f"folder={tmp_path}/f"), ALONE)
    assert len(made) == (6 if verify == "first_open" else 0)

"""The published layout: a whole file translated, and what is refused."""

from __future__ import annotations

import copy
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ijepa_scale.config import load_config, read_config
from ijepa_scale.config.published import is_published, translate
from ijepa_scale.errors import ConfigError
from ijepa_scale.planning.reading import read_planned

HUGE = """
data:
  batch_size: 128
  color_jitter_strength: 0.0
  crop_scale: [0.3, 1.0]
  crop_size: 224
  image_folder: imagenet_full_size/061417/
  num_workers: 10
  pin_mem: true
  root_path: /datasets/
  use_color_distortion: false
  use_gaussian_blur: false
  use_horizontal_flip: false
logging:
  folder: /logs/huge/
  write_tag: jepa
mask:
  allow_overlap: false
  aspect_ratio: [0.75, 1.5]
  enc_mask_scale: [0.85, 1.0]
  min_keep: 10
  num_enc_masks: 1
  num_pred_masks: 4
  patch_size: 14
  pred_mask_scale: [0.15, 0.2]
meta:
  copy_data: false
  load_checkpoint: false
  model_name: vit_huge
  pred_depth: 12
  pred_emb_dim: 384
  read_checkpoint: null
  use_bfloat16: true
optimization:
  ema: [0.996, 1.0]
  epochs: 300
  final_lr: 1.0e-06
  final_weight_decay: 0.4
  ipe_scale: 1.0
  lr: 1e-3
  start_lr: 0.0002
  warmup: 40
  weight_decay: 0.04
"""


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(HUGE))


def save(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "published.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refusal(content: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        translate(content)
    return str(caught.value).splitlines()


def test_the_published_huge_run_is_ours_of_that_name(tmp_path: Path, content: dict[str, Any]) -> None:
    config = load_config(save(tmp_path, content))
    ours = load_config(Path(__file__).parents[3] / "configs" / "in1k_vith14_ep300.yaml")
    for section in ("model", "masks", "augment", "objective", "optimizer", "schedule", "engine"):
        assert getattr(config, section) == getattr(ours, section), section
    assert (config.data.batch_size, config.data.batch_size_per_process) == (None, 128)
    assert (config.data.reader, config.data.workers) == ("imagefolder", 10)
    assert config.data.train == "/datasets/imagenet_full_size/061417/train"
    assert (config.folder, config.resume, config.seed) == ("/logs/huge/", "none", 0)


@pytest.mark.parametrize("folder", ["/elsewhere/images/", "images", "a/../b"])
def test_an_absolute_image_folder_wins(content: dict[str, Any], folder: str) -> None:
    content["data"] |= {"root_path": "/datasets/", "image_folder": folder}
    expected = os.path.join("/datasets/", folder.rstrip("/"), "train")
    assert translate(content)[0]["data"]["train"] == expected


def test_planning_needs_no_paths(tmp_path: Path, content: dict[str, Any]) -> None:
    content["data"] |= {"root_path": "$replace_this", "image_folder": "$and_this"}
    content["logging"]["folder"] = "$and_this_too/"
    path = save(tmp_path, content)
    with pytest.raises(ConfigError, match="data.root_path is still the placeholder"):
        read_config(path)
    assert read_planned(str(path)).model.name == "vit_huge"


def test_a_file_with_checkpoint_file_is_read(content: dict[str, Any]) -> None:
    content["meta"]["checkpoint_file"] = "x.pth.tar"
    assert "meta.checkpoint_file ignored: the published code doesn't read it" in "\n".join(translate(content)[1])


def test_every_key_is_translated_or_noted(content: dict[str, Any]) -> None:
    """Each key of the file is changed in turn: the result or the notes must change with it, or name it."""
    before, notes = translate(content)
    for section, values in content.items():
        for key, value in values.items():
            changed = copy.deepcopy(content)
            if isinstance(value, bool):
                changed[section][key] = not value
            elif isinstance(value, (int, float)):
                changed[section][key] = value + 1
            elif isinstance(value, list):
                changed[section][key] = [v * 0.9 for v in value]
            else:
                changed[section][key] = "other"
            after, after_notes = translate(changed)
            told = any(f"{section}.{key}" in note for note in after_notes)
            assert after != before or told, f"{section}.{key}"


def test_notes_say_what_was_ignored_and_why(content: dict[str, Any]) -> None:
    content["data"]["color_jitter_strength"] = 0.5
    content["meta"]["read_checkpoint"] = "x.pth.tar"
    _, notes = translate(content, num_processes=16)
    text = "\n".join(notes)
    assert "data.pin_mem ignored: memory is pinned wherever there is a GPU" in notes
    assert "meta.copy_data ignored: data is read where it lies" in notes
    assert "logging.write_tag ignored: the files of a run have fixed names in its folder" in notes
    assert "data.batch_size 128 is per process, 2048 over 16 processes" in text
    assert "data.color_jitter_strength ignored: data.use_color_distortion is false" in notes
    assert "meta.read_checkpoint x.pth.tar ignored: meta.load_checkpoint is false" in notes
    assert "seed: a published file has none" in text


def test_notes_are_returned_and_logged(
    tmp_path: Path, content: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, content)
    notes = read_config(path, num_processes=4).notes
    assert "512 over 4 processes" in "\n".join(notes)
    with caplog.at_level(logging.INFO):
        load_config(path)
    assert f"{path}: data.pin_mem ignored" in caplog.text


def test_augmentation_switches_become_the_published_probabilities(tmp_path: Path, content: dict[str, Any]) -> None:
    content["data"] |= {
        "use_color_distortion": True, "use_gaussian_blur": True, "use_horizontal_flip": True,
        "color_jitter_strength": 0.6,
    }  # fmt: skip
    content["meta"]["use_bfloat16"] = False
    config = load_config(save(tmp_path, content))
    augment = config.augment
    assert (augment.color_jitter, augment.color_jitter_probability, augment.grayscale) == (0.6, 0.8, 0.2)
    assert (augment.blur, augment.flip) == (0.5, 0.5)
    assert config.engine.precision == "fp32"


def test_overrides_are_ours_on_a_published_file(tmp_path: Path, content: dict[str, Any]) -> None:
    path = save(tmp_path, content)
    config = load_config(path, ["data.batch_size=64", "schedule.epochs=3", "schedule.warmup_epochs=1"])
    assert (config.data.batch_size, config.data.batch_size_per_process, config.schedule.epochs) == (64, None, 3)
    with pytest.raises(ConfigError, match="optimization.lr: unknown; did you mean optimizer.lr?"):
        load_config(path, ["optimization.lr=3"])


@pytest.mark.parametrize(
    ("load", "name", "resume", "init"),
    [
        (False, None, "none", None),
        (False, "jepa-ep5.pth.tar", "none", None),
        (True, None, "auto", None),
        (True, "jepa-ep5.pth.tar", "auto", "/logs/huge/jepa-ep5.pth.tar"),
        (True, "checkpoints/step-00000005", "/logs/huge/checkpoints/step-00000005", None),
    ],
)
def test_loading_becomes_starting_or_resuming(
    content: dict[str, Any], load: bool, name: str | None, resume: str, init: str | None
) -> None:
    content["meta"] |= {"load_checkpoint": load, "read_checkpoint": name}
    ours, notes = translate(content)
    assert (ours["resume"], ours["model"].get("init")) == (resume, init)
    assert ours["model"].get("init_state") == (None if init is None else "training")
    assert any(init in note and "model.init_state=training" in note for note in notes) if init else True


def test_placeholders_are_refused_by_name(content: dict[str, Any]) -> None:
    content["data"]["root_path"] = "$replace_this_with_absolute_path_to_your_datasets_directory"
    content["logging"]["folder"] = "$replace_this_with_absolute_path_to_your_desired_output_directory"
    lines = refusal(content)
    assert len(lines) == 2
    assert lines[0].startswith("published file: data.root_path is still the placeholder '$replace_this_with_absolute")
    assert lines[0].endswith("write your own value") and "logging.folder" in lines[1]


def test_unknown_missing_and_wrong_keys_are_named(content: dict[str, Any]) -> None:
    content["optimization"]["warm_up"] = content["optimization"].pop("warmup")
    content["mask"].pop("patch_size")
    content["meta"]["use_bfloat16"] = "false"
    content["data"]["batch_size"] = "many"
    content["data"]["crop_size"] = None
    assert refusal(content) == [
        "published file: optimization.warm_up: unknown in the published layout; did you mean optimization.warmup?",
        "published file: missing: mask.patch_size, optimization.warmup; the published layout has them all",
        "published file: data.crop_size is null; write a value",
        "published file: meta.use_bfloat16 is 'false'; give true or false",
        "published file: data.batch_size is 'many'; give the images per process, a whole number",
    ]


def test_keys_that_are_only_ignored_may_be_missing(content: dict[str, Any]) -> None:
    for section, key in (("data", "pin_mem"), ("logging", "write_tag"), ("meta", "copy_data"),
                         ("meta", "read_checkpoint"), ("data", "color_jitter_strength")):  # fmt: skip
        del content[section][key]
    assert len(translate(content)[1]) == 2


def test_finetuning_files_are_refused_with_a_pointer(content: dict[str, Any]) -> None:
    content["data"] |= {"nb_classes": 1000, "mixup": 0.8}
    content["optimization"]["label_smoothing"] = 0.1
    assert refusal(content) == [
        "published file: data.mixup, data.nb_classes, optimization.label_smoothing belong to a finetuning file; "
        "pretraining can't use it: start it with launch/finetune.py"
    ]


def test_wrong_values_name_the_file(tmp_path: Path, content: dict[str, Any]) -> None:
    content["optimization"]["epochs"] = "long"
    path = save(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: schedule.epochs is 'long'; give a number"


def test_layouts_are_told_apart(content: dict[str, Any]) -> None:
    assert is_published(content)
    assert not is_published({"mask": {}, "data": {}})
    assert not is_published({**content, "masks": {}})
    assert not is_published({"model": {}, "data": {}, "logging": {}})
    assert not is_published({})


def test_text_of_a_published_file_stays_as_written(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "published.yaml"
    text = yaml.safe_dump(content)
    for key, value in {"root_path": "2024_01", "image_folder": "0012", "folder": "1.10"}.items():
        text = re.sub(rf"(?m)^(\s+{key}:).*$", rf"\1 {value}", text)
    path.write_text(text)
    config = load_config(path)
    assert (config.data.train, config.folder) == ("2024_01/0012/train", "1.10")

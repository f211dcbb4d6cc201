"""Finetuning configurations: every recipe is built, the known fork's files are translated, mistakes have texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ijepa_scale.config import PretrainConfig, load_config, read_config
from ijepa_scale.config.finetune_run import ClassifierEvaluationConfig, FinetuneConfig
from ijepa_scale.engine.ds_config import load_ds_config
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.optim.groups import layer_decay_groups
from ijepa_scale.planning.memory import spread_states
from ijepa_scale.planning.spread import Spread

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
# The published encoders' counts less the fixed position embedding, plus a head of 1000 classes.
PARAMETERS = {"vit_base": 86.6e6, "vit_large": 304.3e6, "vit_huge": 632.0e6, "vit_giant": 1012.9e6}


def load(name: str, *overrides: str) -> FinetuneConfig:
    return load_config(ROOT / "configs" / "finetune" / name, overrides, kind=FinetuneConfig)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    config = load_config(path, kind=FinetuneConfig)
    module = build_classifier(config.model, device="meta")
    groups = layer_decay_groups(module, layer_decay=config.optimizer.layer_decay)
    count = sum(parameter.numel() for group in groups for parameter in group["params"])
    if config.model.encoder.width is None:
        assert count == pytest.approx(PARAMETERS[config.model.encoder.name], rel=0.005)
    if config.engine.ds_config is not None:
        assert load_ds_config(ROOT / config.engine.ds_config)["zero_optimization"]["stage"] == 2


def test_giant_is_planned_for_eight_processes():
    config = load("in1k_vitg16.yaml")
    module = build_classifier(config.model, device="meta")
    assert len(module.encoder.blocks) == 40 and module.encoder.width == 1408
    groups = layer_decay_groups(module, layer_decay=config.optimizer.layer_decay)
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    states = spread_states(trained, 0, Spread(strategy="zero2", world=8))
    # fp32: whole weights; gradients, masters and two moments shared out
    assert states.total == pytest.approx(4 * trained * (1 + (1 + 3) / 8)) == pytest.approx(6.1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("in1k_vitb16.yaml", {"epochs": 100, "peak": 2e-3, "decay": 0.65, "drop": 0.1}),
        ("in1k_vitl16.yaml", {"epochs": 50, "peak": 4e-3, "decay": 0.75, "drop": 0.2}),
        ("in1k_vith14_ep300_finetuning.yaml", {"epochs": 50, "peak": 4e-3, "decay": 0.75, "drop": 0.3}),
        ("in1k_vith16-448.yaml", {"epochs": 50, "peak": 1e-4 * 528 / 256, "decay": 0.75, "drop": 0.25}),
        ("lowshot1_vith14.yaml", {"epochs": 50, "peak": 3e-5, "decay": 0.75, "drop": 0.0}),
        ("lowshot1_vitl16.yaml", {"epochs": 50, "peak": 3e-5, "decay": 0.75, "drop": 0.0}),
    ],
)
def test_recipes_hold_the_published_numbers(name, expected):
    config = load(name)
    optimizer = config.optimizer
    found = {
        "epochs": config.schedule.epochs,
        "peak": optimizer.peak_lr(config.data.batch_size or 0),
        "decay": optimizer.layer_decay,
        "drop": config.model.drop_path,
    }
    assert found == pytest.approx(expected)
    assert optimizer.min_lr == 1e-6 and config.schedule.warmup_epochs == 5 and config.augment.label_smoothing == 0.1
    low_shot = name.startswith("lowshot")
    mixing = (config.augment.mixup, config.augment.cutmix, config.augment.random_erasing)
    assert mixing == ((0.0, 0.0, 0.0) if low_shot else (0.8, 1.0, 0.0 if "448" in name else 0.25))
    assert config.augment.rand_augment == "rand-m9-mstd0.5-inc1"


def test_low_shot_decays_by_model():
    decays = [load(f"lowshot1_{name}.yaml").optimizer.weight_decay for name in ("vith14", "vitl16")]
    assert decays == [0.4, 0.05]
    assert load("in1k_vith16-448.yaml").optimizer.weight_decay == 0.04


def test_one_rate_replaces_the_other():
    assert load("in1k_vitl16.yaml", "optimizer.lr=1e-4").optimizer.base_lr is None
    assert load("lowshot1_vith14.yaml", "optimizer.base_lr=1e-4").optimizer.lr is None


@pytest.mark.parametrize(
    ("size", "fraction"), [((224, 224), 0.875), ((448, 448), 1.0), ((28, 28), 1.0), ((64, 96), 0.875), ((64, 64), 1.0)]
)
def test_centre_crops(size, fraction):
    assert ClassifierEvaluationConfig().crop_of(size) == fraction
    assert ClassifierEvaluationConfig(crop_fraction=0.9).crop_of(size) == 0.9


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optimizer.layer_decay=1.5", "optimizer.layer_decay is 1.5; give a number above 0 and at most 1"),
        ("optimizer.ema=1.0", "optimizer.ema is 1.0; give a number above 0 and below 1, or null"),
        ("evaluate.every_epochs=0", "evaluate.every_epochs is 0; give a number above 0"),
        ("evaluate.crop_fraction=1.5", "evaluate.crop_fraction is 1.5; give a number above 0 and at most 1, or null"),
        ("seed=-1", "seed is -1; give at least 0"),
        ("stop_after=-1", "schedule.stop_after is -1; give at least 0, or null"),
        ("data.reader=stream", "data.reader is stream; finetuning counts epochs and labels"),
        ("engine.target_precision=fp8", "engine.target_precision is fp8; finetuning has no target: set it to null"),
        ("model.drop_pat=0.1", "model.drop_pat: unknown; did you mean model.drop_path?"),
        ("model.num_classes=0", "model.num_classes is 0; give at least 1"),
    ],
)
def test_mistakes_have_texts(override, text):
    with pytest.raises(ConfigError) as error:
        load("in1k_vitb16.yaml", override)
    assert text in str(error.value)


def forked(**changes: object) -> dict:
    """Returns a finetuning file of the fork's layout."""
    content = {
        "data": {
            "batch_size": 16, "color_jitter_strength": 0.0, "crop_scale": [0.3, 1.0], "crop_size": 224,
            "image_folder": "/data/imagenet/", "num_workers": 8, "pin_mem": True, "root_path": "/data/",
            "drop_path": 0.25, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "nb_classes": 1000, "resume_epoch": 3,
            "use_color_distortion": False, "use_gaussian_blur": False, "use_horizontal_flip": True,
        },
        "logging": {"folder": "logs/h14/", "write_tag": "jepa"},
        "mask": {
            "allow_overlap": False, "aspect_ratio": [0.75, 1.5], "enc_mask_scale": [0.85, 1.0], "min_keep": 10,
            "num_enc_masks": 1, "num_pred_masks": 4, "patch_size": 14, "pred_mask_scale": [0.15, 0.2],
        },
        "meta": {
            "copy_data": False, "load_checkpoint": True, "model_name": "vit_huge", "pred_depth": 12,
            "pred_emb_dim": 384, "read_checkpoint": "IN1K-vit.h.14-300e.pth.tar", "use_bfloat16": True,
        },
        "optimization": {
            "ema": [0.996, 1.0], "epochs": 50, "final_lr": 1e-6, "final_weight_decay": 0.4, "ipe_scale": 1.0,
            "label_smoothing": 0.1, "lr": 1e-3, "start_lr": 2e-4, "warmup": 5, "weight_decay": 0.05,
        },
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if value is None:
            del content[section][name]
        else:
            content[section][name] = value
    return content


def write(tmp_path: Path, content: dict) -> Path:
    path = tmp_path / "fork.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_forks_file_is_translated(tmp_path):
    loaded = read_config(write(tmp_path, forked()), kind=FinetuneConfig, num_processes=8)
    config: FinetuneConfig = loaded.config
    encoder = config.model.encoder
    assert (encoder.name, encoder.patch_size, encoder.image_size) == ("vit_huge", 14, (224, 224))
    assert (config.model.drop_path, config.model.num_classes) == (0.25, 1000)
    assert config.model.init == "logs/h14/IN1K-vit.h.14-300e.pth.tar" and config.model.weights == "target"
    assert (config.data.batch_size, config.data.batch_size_per_process) == (None, 16)
    assert (config.data.train, config.evaluate.test) == ("/data/imagenet/train", "/data/imagenet/val")
    assert config.data.reader == config.evaluate.reader == "imagefolder"
    augment = config.augment
    assert (augment.mixup, augment.cutmix, augment.random_erasing, augment.flip) == (0.8, 1.0, 0.25, 0.5)
    optimizer = config.optimizer.values()
    expected = {"lr": 1e-3, "base_lr": None, "min_lr": 1e-6, "layer_decay": 1.0}
    assert {name: optimizer[name] for name in expected} == expected
    assert (config.schedule.epochs, config.schedule.warmup_epochs) == (50, 5)
    text = "\n".join(loaded.notes)
    assert "128 over 8 processes" in text and "optimizer.layer_decay is 1" in text
    assert augment.crop_scale == (0.08, 1.0)
    assert "data.crop_scale ignored, as by the fork: augment.crop_scale is [0.08, 1.0]" in text
    assert "the fork ramps 0.05 to 0.4, here it stays at 0.05" in text and "warms up from 0.0002, here from 0" in text
    for key in (
        "data.root_path",
        "data.resume_epoch",
        "mask.min_keep",
        "meta.pred_depth",
        "optimization.ema",
        "optimization.start_lr",
    ):
        assert f"{key} ignored: " in text


def test_without_a_checkpoint_the_file_says_so(tmp_path):
    loaded = read_config(write(tmp_path, forked(meta__load_checkpoint=False)), kind=FinetuneConfig)
    assert loaded.config.model.init is None and "the weights are random" in "\n".join(loaded.notes)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({}, PretrainConfig, "belong to a finetuning file"),
        ({"data__mixup": None}, FinetuneConfig, "missing: data.mixup"),
        ({"meta__read_checkpoint": None}, FinetuneConfig, "is true but meta.read_checkpoint names no file"),
        ({"data__cutmixx": 1.0}, FinetuneConfig, "data.cutmixx: unknown in the published layout; did you mean"),
        ({"data__root_path": "$replace_this"}, FinetuneConfig, "data.root_path is still the placeholder"),
        ({"meta__use_bfloat16": 1}, FinetuneConfig, "meta.use_bfloat16 is 1; give true or false"),
        ({"data__batch_size": 1.5}, FinetuneConfig, "data.batch_size is 1.5; give the images per process"),
        (
            {f"data__{n}": None for n in ("drop_path", "mixup", "cutmix", "reprob", "nb_classes", "resume_epoch")}
            | {"optimization__label_smoothing": None},
            FinetuneConfig,
            "so it is a pretraining file; start it with launch/pretrain.py",
        ),
    ],
)
def test_files_that_cannot_be_translated(tmp_path, changes, kind, text):
    with pytest.raises(ConfigError) as error:
        read_config(write(tmp_path, forked(**changes)), kind=kind)
    assert text in str(error.value)

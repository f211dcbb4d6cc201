"""The finetuning schedule against its formula, and the sections of the configuration that set it."""

from __future__ import annotations

import math

import pytest

from ijepa_scale.config.finetune_run import ClassifierConfig, FinetuneOptimizerConfig, FinetuneScheduleConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.schedules import FinetuneSchedule, Hyper

SCHEDULE = FinetuneSchedule(steps_per_epoch=10, epochs=50, warmup_epochs=5, lr=4e-3, min_lr=1e-6, weight_decay=0.05)


def test_warm_up_begins_at_zero_and_rises_each_step() -> None:
    assert SCHEDULE(0) == Hyper(lr=0.0, weight_decay=0.05, momentum=1.0)
    assert [SCHEDULE(s).lr for s in (1, 25, 49)] == pytest.approx([4e-3 / 50, 2e-3, 4e-3 * 49 / 50])
    assert SCHEDULE(50).lr == 4e-3


def test_cosine_follows_the_fractional_epoch() -> None:
    for step in range(50, 500):
        epoch = step / 10
        cosine = 1e-6 + (4e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 45))
        assert SCHEDULE(step).lr == pytest.approx(cosine, rel=1e-12)
    assert SCHEDULE(275).lr == pytest.approx((4e-3 + 1e-6) / 2)
    assert 1e-6 < SCHEDULE(499).lr < 1.1e-6 and SCHEDULE(500).lr == SCHEDULE(600).lr == 1e-6
    assert {SCHEDULE(s).weight_decay for s in range(500)} == {0.05} and SCHEDULE.total_steps == 500


def test_fractions_of_epochs_and_no_warm_up() -> None:
    half = FinetuneSchedule(steps_per_epoch=8, epochs=2.5, warmup_epochs=0.5, lr=1.0, min_lr=0.0, weight_decay=0.0)
    assert half.total_steps == 20 and half(2).lr == 0.5 and half(4).lr == 1.0 and half(12).lr == pytest.approx(0.5)
    none = FinetuneSchedule(steps_per_epoch=8, epochs=1, warmup_epochs=0, lr=1.0, min_lr=0.0, weight_decay=0.0)
    assert none(0).lr == 1.0


def test_the_rate_is_proportional_to_the_batch_unless_lr_is_set() -> None:
    assert FinetuneOptimizerConfig().peak_lr(1024) == pytest.approx(4e-3)
    assert FinetuneOptimizerConfig(base_lr=1e-4).peak_lr(528) == pytest.approx(1e-4 * 528 / 256)
    assert FinetuneOptimizerConfig(lr=3e-5).peak_lr(512) == 3e-5
    engine = FinetuneOptimizerConfig(clip_norm=2.0, betas=[0.8, 0.9], eps=1e-7, impl="torch").adamw(512)
    assert (engine.lr, engine.clip_norm, engine.betas, engine.eps, engine.impl) == (
        2e-3,
        2.0,
        (0.8, 0.9),
        1e-7,
        "torch",
    )


OPTIMIZER = {
    "layer_decay is 1.2; give a number above 0 and at most 1": {"layer_decay": 1.2},
    "layer_decay is 0.0; give a number above 0": {"layer_decay": 0.0},
    "base_lr is 0.1 and lr is 0.2; give one of them": {"base_lr": 0.1, "lr": 0.2},
    "impl is 'sgd'; choose one of auto": {"impl": "sgd"},
    "min_lr is -1; give at least 0": {"min_lr": -1},
    "weight_decay is -1; give at least 0": {"weight_decay": -1},
    "betas is (0.9, 1.0); give 2 numbers, each from 0 to below 1": {"betas": (0.9, 1.0)},
    "betas is 3; give 2 numbers": {"betas": 3},
    "clip_norm is 0; give a number above 0, or null": {"clip_norm": 0},
}
SCHEDULES = {
    "epochs is 0; give a number above 0": {"epochs": 0},
    "warmup_epochs 50 leaves nothing of the 50 epochs; give fewer": {"warmup_epochs": 50},
    "stop_after is -1; give at least 0, or null": {"stop_after": -1},
}
CLASSIFIER = {
    "num_classes is 0; give at least 1": {"num_classes": 0},
    "drop_path is 1.0; give a number from 0 to below 1": {"drop_path": 1.0},
    "drop_path is -0.1; give a number from 0 to below 1": {"drop_path": -0.1},
    "representation is 'mean'; choose one of last, last4": {"representation": "mean"},
    "pool_norm is 'none'; choose one of after, before": {"pool_norm": "none"},
    "frozen_blocks is -1; give at least 0": {"frozen_blocks": -1},
    "weights is 'ema'; choose one of target, context": {"weights": "ema"},
    "keep_head is true but init is null; name the file whose head is kept": {"keep_head": True},
    "encoder.image_size (100, 224) isn't a multiple of patch_size 16": {"encoder": {"image_size": (100, 224)}},
    "encoder.image_size is 'big'; give one number, or [height, width]": {"encoder": {"image_size": "big"}},
    "encoder.depth is 0; give at least 1, or null": {"encoder": {"depth": 0}},
}


@pytest.mark.parametrize("text", OPTIMIZER)
def test_optimizer_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        FinetuneOptimizerConfig(**OPTIMIZER[text])
    assert f"optimizer.{text}" in str(error.value)


@pytest.mark.parametrize("text", SCHEDULES)
def test_schedule_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        FinetuneScheduleConfig(**SCHEDULES[text])
    assert f"schedule.{text}" in str(error.value)


@pytest.mark.parametrize("text", CLASSIFIER)
def test_classifier_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        ClassifierConfig(**CLASSIFIER[text])
    assert f"model.{text}" in str(error.value)


def test_one_message_lists_all_problems() -> None:
    with pytest.raises(ConfigError) as error:
        ClassifierConfig(encoder={"image_size": 100, "patch_size": 16}, num_classes=0)
    assert len(str(error.value).splitlines()) == 2

"""Files, overrides and checkpoints of earlier layouts keep working."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest

from ijepa_scale.config import EncoderConfig, PretrainConfig, load_config, read_config
from ijepa_scale.config.earlier import stored
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.errors import ConfigError

OLD = "model: {name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 3, heads: 2, num_classes: 2}\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def test_earlier_names_of_the_encoder_are_read(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = load_config(old, ["model.depth=4", "model.name=vit_small"], kind=FinetuneConfig)
    encoder = EncoderConfig(name="vit_small", image_size=(32, 32), patch_size=4, width=24, depth=4, heads=2)
    assert config.model.encoder == encoder and config.model.num_classes == 2
    assert f"{old}: model.depth is called model.encoder.depth now" in caplog.text
    notes = read_config(old, kind=FinetuneConfig).notes
    assert len(notes) == 6 and "model.name is called model.encoder.name now" in notes


def test_errors_name_what_the_setting_is_called_now(old: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(old, ["model.heads=x"], kind=FinetuneConfig)
    assert str(caught.value) == "command line: model.encoder.heads is 'x'; give a whole number or null"


def test_both_names_at_once_are_refused(old: Path) -> None:
    old.write_text("model: {depth: 3, encoder: {depth: 4}}")
    with pytest.raises(ConfigError, match="model.depth: unknown; did you mean model.encoder.depth"):
        load_config(old, kind=FinetuneConfig)


def test_pretraining_keeps_its_names(old: Path) -> None:
    old.write_text("model: {name: vit_tiny}")
    loaded = read_config(old)
    assert loaded.config.model.name == "vit_tiny" and not loaded.notes


def test_what_a_checkpoint_stores_is_brought_to_the_layout_of_today() -> None:
    config = FinetuneConfig(model={"encoder": {"name": "vit_tiny", "image_size": 32}, "num_classes": 2}, seed=4)
    values = config.values()
    old = copy.deepcopy(values)
    old["model"].update(old["model"].pop("encoder"))
    del old["model"]["keep_head"], old["logging"]["sinks"], old["resume"]
    del values["resume"]
    assert stored(old, FinetuneConfig) == values
    identity = {"seed": 4, "model": old["model"], "data": "shards-7", "batch size of all processes": 8}
    assert stored(identity, FinetuneConfig) == {**identity, "model": values["model"]}


def test_a_default_that_a_checkpoint_does_not_know_is_filled_in() -> None:
    values = PretrainConfig(objective={"loss": "l2"}).values()
    assert stored({"objective": {"loss": "l2"}}, PretrainConfig) == {"objective": values["objective"]}
    assert stored({"optimizer": {"lr": 0.5}}, PretrainConfig)["optimizer"]["name"] == "adamw"

"""Files, overrides and checkpoints of earlier layouts keep working."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config import EncoderConfig, PretrainConfig, load_config, read_config
from ijepa_scale.config.earlier import stored
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.yaml_text import flat, nest
from ijepa_scale.errors import ConfigError

OLD = "model: {name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 3, heads: 2, num_classes: 2}\n"
RENAMED = {  # of finetuning: earlier name -> today's, and a value
    "optimizer.epochs": ("schedule.epochs", 7.0),
    "optimizer.warmup_epochs": ("schedule.warmup_epochs", 2.0),
    "stop_after": ("schedule.stop_after", 5),
    "evaluate.data": ("evaluate.test", "held/out"),
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


@pytest.mark.parametrize("empty", ["schedule: {}\n", "schedule:\n"])
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_section_takes_no_setting_away(empty: str, first: bool, tmp_path: Path) -> None:
    lines = [empty, "optimizer: {epochs: 7}\nstop_after: 5\n"]
    (tmp_path / "old.yaml").write_text("".join(lines if first else reversed(lines)) + OLD)
    config = load_config(tmp_path / "old.yaml", kind=FinetuneConfig)
    assert (config.schedule.epochs, config.schedule.stop_after) == (7, 5)


@pytest.mark.parametrize("wrong", ["schedule: 5\nstop_after: 5\n", "stop_after: 5\nschedule: 5\n"])
def test_a_section_that_is_none_is_refused_all_the_same(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(wrong + OLD)
    with pytest.raises(ConfigError, match="schedule"):
        load_config(tmp_path / "old.yaml", kind=FinetuneConfig)


def test_earlier_names_of_the_encoder_are_read(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = load_config(old, ["model.depth=4", "model.name=vit_small"], kind=FinetuneConfig)
    encoder = EncoderConfig(name="vit_small", image_size=(32, 32), patch_size=4, width=24, depth=4, heads=2)
    assert config.model.encoder == encoder and config.model.num_classes == 2
    assert f"{old}: model.depth is called model.encoder.depth now" in caplog.text
    notes = read_config(old, kind=FinetuneConfig).notes
    assert len(notes) == 6 and "model.name is called model.encoder.name now" in notes


@given(st.dictionaries(st.sampled_from(list(RENAMED)), st.booleans(), min_size=1), st.booleans())
def test_finetunings_earlier_names_are_read(
    tmp_path_factory: pytest.TempPathFactory, changed: dict[str, bool], below: bool
) -> None:
    """From files and the command line, with a note; a name over the other one wins like a name over itself."""
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    earlier = {"optimizer": {"epochs": 9, "warmup_epochs": 3}, "stop_after": 1, "evaluate": {"data": "x"}}
    today = {"schedule": {"epochs": 9, "warmup_epochs": 3, "stop_after": 1}, "evaluate": {"test": "x"}}
    path.write_text(str(earlier if below else today))
    overrides = [f"{RENAMED[name][0] if new else name}={RENAMED[name][1]}" for name, new in changed.items()]
    loaded = read_config(path, overrides, kind=FinetuneConfig)
    notes = {f"{name} is called {now} now" for name, (now, _) in RENAMED.items()}
    said = {f"{name} is called {RENAMED[name][0]} now" for name, new in changed.items() if not new}
    assert {*loaded.notes} == (notes if below else said)
    expected = flat(today) | {RENAMED[name][0]: RENAMED[name][1] for name in changed}
    found = flat(loaded.config.values())
    assert {name: found[name] for name in expected} == expected
    assert not {*RENAMED} & {*found}  # so config.yaml has today's names only


def test_errors_name_what_the_setting_is_called_now(old: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(old, ["model.heads=x"], kind=FinetuneConfig)
    assert str(caught.value) == "command line: model.encoder.heads is 'x'; give a whole number or null"


def test_both_names_at_once_are_refused(old: Path) -> None:
    old.write_text("model: {depth: 3, encoder: {depth: 4}}")
    with pytest.raises(ConfigError, match="model.depth: unknown; did you mean model.encoder.depth"):
        load_config(old, kind=FinetuneConfig)
    old.write_text("{stop_after: 3, schedule: {stop_after: 4}}")
    with pytest.raises(ConfigError, match="stop_after: unknown; did you mean schedule.stop_after"):
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


def test_settings_that_moved_to_a_section_of_their_own_are_found_in_a_checkpoint() -> None:
    config = FinetuneConfig(schedule={"epochs": 9, "stop_after": 4}, evaluate={"test": "x"})
    values, old = config.values(), in_earlier_names(config.values())
    assert "schedule" not in old and old["stop_after"] == 4 and old["evaluate"]["data"] == "x"
    assert stored(old, FinetuneConfig) == values
    del old["engine"]["strategy"], old["evaluate"]["workers"]  # as if the checkpoint didn't know them
    found = stored(old, FinetuneConfig, sections=("schedule", "evaluate"))
    assert found["schedule"] == values["schedule"] and found["evaluate"] == values["evaluate"]
    assert found["engine"] == old["engine"]  # as it is, since it wasn't asked for
    identity = {"optimizer": old["optimizer"], "data": "shards-7", "data.window_shards": 8}
    expected = {**identity, "optimizer": values["optimizer"], "schedule": {**values["schedule"], "stop_after": None}}
    assert stored(identity, FinetuneConfig) == expected


def in_earlier_names(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a finetuning configuration's values as they were stored when settings had their earlier names."""
    earlier = {now: name for name, (now, _) in RENAMED.items()}
    return nest({earlier.get(name, name): value for name, value in flat(values).items()})


def test_a_default_that_a_checkpoint_does_not_know_is_filled_in() -> None:
    values = PretrainConfig(objective={"loss": "l2"}).values()
    assert stored({"objective": {"loss": "l2"}}, PretrainConfig) == {"objective": values["objective"]}
    assert stored({"optimizer": {"lr": 0.5}}, PretrainConfig)["optimizer"]["name"] == "adamw"

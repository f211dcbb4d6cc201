"""A configuration given to the script of the other kind of run, and names that both kinds have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config import PretrainConfig, read_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.published import is_published
from ijepa_scale.config.yaml_text import parse_yaml
from ijepa_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
PRETRAINING = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.name != "base.yaml"]  # that one fits both
FINETUNING = sorted((CONFIGS / "finetune").glob("*.yaml"))
SAME = {  # of finetuning: pretraining's name -> the one that config.yaml has
    "schedule.epochs": ("optimizer.epochs", 7.0),
    "schedule.warmup_epochs": ("optimizer.warmup_epochs", 2.0),
    "schedule.stop_after": ("stop_after", 5),
    "evaluate.test": ("evaluate.data", "held/out"),
}


@pytest.mark.parametrize("path", [*PRETRAINING, *FINETUNING], ids=lambda path: path.stem)
def test_a_file_for_the_other_script_is_one_line_that_names_it(path: Path) -> None:
    assert not is_published(parse_yaml(path.read_text(), str(path)))
    other, script = (PretrainConfig, "finetune") if path in FINETUNING else (FinetuneConfig, "pretrain")
    with pytest.raises(ConfigError) as caught:
        read_config(path, kind=other, choose=lambda _: {})
    (line,) = caught.value.problems
    task = {"finetune": "finetuning", "pretrain": "pretraining"}[script]
    assert line.startswith(f"{path}: ") and f"of {task}; start it with launch/{script}.py, or name another" in line


def test_a_setting_of_the_other_kind_is_named_as_such(tmp_path: Path) -> None:
    demo = CONFIGS / "demo.yaml"
    with pytest.raises(ConfigError) as caught:
        read_config(demo, ["model.num_classes=4", "optimizer.lrr=1"])
    assert caught.value.problems == [
        "command line: model.num_classes: only finetuning has this setting; remove it",
        "command line: optimizer.lrr: unknown; did you mean optimizer.lr?",
    ]


@given(st.dictionaries(st.sampled_from(list(SAME)), st.booleans(), min_size=1))
def test_finetuning_reads_pretrainings_names_too(tmp_path_factory: pytest.TempPathFactory, names: dict) -> None:
    """From files and the command line, without a note; a name over the other one wins like a name over itself."""
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    own = {"optimizer": {"epochs": 9, "warmup_epochs": 3}, "stop_after": 1, "evaluate": {"data": "x"}}
    path.write_text(str(own))
    overrides = [f"{name if new else SAME[name][0]}={SAME[name][1]}" for name, new in names.items()]
    loaded = read_config(path, overrides, kind=FinetuneConfig)
    assert not loaded.notes
    values = loaded.config.values()
    for name in names:
        key, expected = SAME[name]
        section, _, leaf = key.rpartition(".")
        assert (values[section] if section else values)[leaf] == expected


def test_both_names_of_a_setting_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{stop_after: 3, schedule: {stop_after: 4}}")
    with pytest.raises(ConfigError, match="schedule.stop_after: .*stop_after"):
        read_config(path, kind=FinetuneConfig)

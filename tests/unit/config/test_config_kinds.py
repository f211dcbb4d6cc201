"""A configuration given to the script of the other kind of run, and settings that both kinds have."""

from __future__ import annotations

from pathlib import Path

import pytest

from ijepa_scale.config import PretrainConfig, read_config
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.published import is_published
from ijepa_scale.config.yaml_text import parse_yaml
from ijepa_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
PRETRAINING = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.name != "base.yaml"]  # that one fits both
FINETUNING = sorted((CONFIGS / "finetune").glob("*.yaml"))


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


def test_both_kinds_call_the_same_things_alike() -> None:
    same = {"schedule.epochs", "schedule.warmup_epochs", "schedule.stop_after", "evaluate.test", "evaluate.reader"}
    assert same <= {*known_keys(PretrainConfig)} & {*known_keys(FinetuneConfig)}

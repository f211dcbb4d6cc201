"""A configuration that needs what `make demo` makes says so where it isn't there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.train.demo_files import check_made

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = {
    CONFIGS / "demo.yaml": (PretrainConfig, "data.train is datasets/fashion-mnist/train"),
    CONFIGS / "finetune" / "demo_finetune.yaml": (FinetuneConfig, "model.init is runs/demo"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_before_the_demo_its_configurations_name_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, named = FILES[path]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_made(load_config(path, kind=kind))
    (line,) = caught.value.problems
    assert line == (
        f"{named}, which the demonstration makes and isn't in {tmp_path}; run `make demo` there first "
        "(python launch/demo.py), or name your own"
    )
    for folder in ("runs/demo", "datasets/fashion-mnist/train", "datasets/fashion-mnist/test"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "datasets/fashion-mnist/few").mkdir()
    check_made(load_config(path, kind=kind))


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.train=mine", "evaluate.every=0"),
        ("data.train=mine", "evaluate.train=mine", "evaluate.test=nowhere"),
        ("data.reader=synthetic", "data.train=null", "evaluate.every=0"),
    ],
)
def test_other_files_and_what_is_not_read_are_left_alone(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_made(load_config(CONFIGS / "demo.yaml", overrides))

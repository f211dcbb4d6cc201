"""Shipped files are found from any folder, what a user has wins, and texts call the scripts as the user calls them."""

from __future__ import annotations

import ast
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale import shipped
from ijepa_scale.config import load_config, read_config
from ijepa_scale.engine.ds_config import load_ds_config
from ijepa_scale.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAMES = ["configs", "ds_configs", "a", "b.yaml", "..", "."]
PATHS = st.builds("/".join, st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
FILES = st.sets(st.builds("/".join, st.tuples(st.sampled_from(NAMES[:3]), st.sampled_from(["a", "b.yaml"]))))


@given(PATHS, FILES, FILES, st.sampled_from([".", "inside"]), st.booleans())
def test_what_exists_wins_and_only_shipped_folders_are_looked_up(path, here, package, beside, absolute) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        root = Path(folder)
        patched.setattr(shipped, "_PACKAGE", root / "package" / "ijepa_scale")
        patched.chdir(root)
        base = root / "home" / beside
        for file in {*(base / name for name in here), *(root / "package" / name for name in package)}:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        base.mkdir(parents=True, exist_ok=True)
        asked = f"{base}/{path}" if absolute else path
        found = shipped.find(asked, base)
        named, other = base / asked, root / "package" / path
        is_shipped = Path(path).parts[:1] in (("configs",), ("ds_configs",)) and ".." not in path and not absolute
        if named.exists() or not is_shipped or not other.exists():
            assert found == named
        else:
            assert found == other
        assert shipped.elsewhere(asked, base) == (f", nor is there {other}" if is_shipped else "")


def test_broken_links_and_closed_folders_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").symlink_to("nothing")
    assert shipped.find("configs/demo.yaml") == Path("configs/demo.yaml")
    too_long = f"configs/{'x' * 300}.yaml"
    assert shipped.find(too_long) == Path(too_long) and shipped.find("configs/a\0b") == Path("configs/a\0b")


def test_configurations_and_deepspeed_files_are_found_from_any_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = read_config("configs/demo.yaml")
    assert loaded.config == load_config(ROOT / "configs" / "demo.yaml")
    assert loaded.notes == [f"configs/demo.yaml is the package's, {ROOT}/configs/demo.yaml"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.yaml").write_text("base: configs/demo.yaml\nseed: 7\n")
    mine = read_config("deep/mine.yaml")
    assert mine.config == loaded.config.replace(seed=7) and mine.notes == loaded.notes
    assert load_ds_config("ds_configs/zero3.json") == load_ds_config(ROOT / "ds_configs" / "zero3.json")

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("seed: 8\n")
    own = read_config("configs/demo.yaml")
    assert own.config.seed == 8 and own.config.folder != loaded.config.folder and own.notes == []
    assert load_config("deep/mine.yaml").folder == loaded.config.folder  # a base is beside the file that names it


def test_a_missing_file_is_told_with_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=f"^configs/no.yaml: no such .*, nor is there {ROOT}/configs/no.yaml; configs/"
    ):
        load_config("configs/no.yaml")
    with pytest.raises(ConfigError, match=f"^ds_configs/no.json: no such .*, nor is there {ROOT}/ds_configs/no.json;"):
        load_ds_config("ds_configs/no.json")
    (tmp_path / "mine.yaml").write_text("base: configs/no.yaml\n")
    with pytest.raises(
        ConfigError, match=rf"\(the base of {tmp_path}/mine.yaml\), nor is there {ROOT}/configs/no.yaml"
    ):
        load_config(tmp_path / "mine.yaml")
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="^configs/no.yaml: no such configuration file; configs/ holds ready ones$"):
        load_config("configs/no.yaml")


CALLS = {
    "python launch/plan.py --gpus 8x h100": "ijepa plan --gpus 8x h100",
    "start it with launch/finetune.py": "start it with ijepa finetune",
    "torchrun --nproc-per-node 8 launch/pretrain.py --config C": (
        "torchrun --nproc-per-node 8 -m ijepa_scale pretrain --config C"
    ),
    "torchrun --nnodes 1:4 --rdzv-endpoint HOST launch/pretrain.py": (
        "torchrun --nnodes 1:4 --rdzv-endpoint HOST -m ijepa_scale pretrain"
    ),
    "deepspeed launch/finetune.py": "deepspeed --module ijepa_scale finetune",
    "srun --ntasks-per-node 8 python launch/pretrain.py": "srun --ntasks-per-node 8 ijepa pretrain",
    "torchrun is one; launch/plan.py plans": "torchrun is one; ijepa plan plans",
    **{
        text: text
        for text in ("/a/launch/plan.py", "my-launch/plan.py", "launch/mine.py", "launch/plan.pyc", "~launch/")
    },
}


@pytest.mark.parametrize("text", CALLS)
def test_scripts_are_named_as_they_are_called(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["launch/plan.py"])
    assert shipped.as_called(text) == text
    monkeypatch.setattr("sys.argv", ["ijepa plan"])
    assert shipped.as_called(text) == CALLS[text]
    monkeypatch.setattr("sys.argv", ["/x/plan.py"])
    monkeypatch.setattr(shipped, "is_installed", lambda: True)
    monkeypatch.setattr(shipped, "folder", lambda name: ROOT / name)
    assert shipped.as_called(text) == CALLS[text]


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_no_help_of_a_command_names_a_path_of_the_checkout(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [f"ijepa {script.stem}"])
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    told = shipped.as_called(text)
    assert "launch/" not in told and told.count(f" {script.stem} ") >= text.count(f"launch/{script.name} ")


def test_the_wheel_is_recognised_by_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shipped.is_installed() and shipped.folder("configs") == ROOT / "configs"
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    os.makedirs(tmp_path / "_repository")
    assert shipped.is_installed() and shipped.folder("launch") == tmp_path / "_repository" / "launch"

"""The wheel holds all that the repository ships, through the sdist too, and works outside a checkout."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from ijepa_scale.environment import child_environment
from tests.unit.installed import ROOT, build, copy_checkout, environment_with, run_in

NAMES = {"kernels": "ijepa_kernels", "ijepa_scale": "ijepa_scale"}  # of folders in the wheel; the others are data
SHIPPED = ("ijepa_scale", "kernels", "launch", "configs", "ds_configs")
SUFFIXES = (".py", ".yaml", ".json", ".jinja")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkout's copy, its sdist, the wheel made from that, one made from the copy, and an editable one."""
    folder = tmp_path_factory.mktemp("built")
    tree = copy_checkout(folder / "tree")
    sdist = build("sdist", tree, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {
        "tree": tree,
        "sdist": sdist,
        "wheel": build("wheel", unpacked, folder / "wheel"),
        "direct": build("wheel", tree, folder / "direct"),
        "editable": build("editable", tree, folder / "editable"),
    }


def shipped_files() -> dict[str, bytes]:
    """Returns what the wheel is to hold beside its metadata."""
    found = {}
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT / folder)
                found[f"{NAMES.get(folder, f'ijepa_scale/_repository/{folder}')}/{inside}"] = path.read_bytes()
    return found


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def test_the_wheel_holds_all_that_the_repository_ships(built: dict[str, Path]) -> None:
    found = content(built["wheel"])
    package = {name: text for name, text in found.items() if ".dist-info/" not in name}
    assert package == shipped_files()
    texts = {name.rpartition("/")[2]: text.decode() for name, text in found.items() if ".dist-info/" in name}
    assert texts["entry_points.txt"] == "[console_scripts]\nijepa = ijepa_scale.commands:main\n"
    assert sorted(texts["top_level.txt"].split()) == ["ijepa_kernels", "ijepa_scale"]
    assert "Name: ijepa_scale" in texts["METADATA"] and "LICENSE" in texts


def test_the_sdist_makes_the_same_wheel(built: dict[str, Path]) -> None:
    assert content(built["wheel"]) == content(built["direct"])


def test_nothing_in_the_repository_is_left_out(built: dict[str, Path]) -> None:
    others = [
        str(path.relative_to(built["tree"]))
        for folder in SHIPPED
        for path in (built["tree"] / folder).rglob("*")
        if path.is_file() and path.suffix not in SUFFIXES
    ]
    assert not others, "add their suffix here and in setup.py"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_it_works_from_any_folder(built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    python = environment_with(built[kind], tmp_path / "environment")
    folder = tmp_path / "elsewhere"
    (folder / "launch").mkdir(parents=True)  # a name that others have too
    (folder / "launch" / "pretrain.py").write_text("raise SystemExit('the wrong script')")
    command = python.with_name("ijepa")
    listed = run_in(folder, command)
    assert listed.stdout.startswith("usage: ijepa COMMAND") and "\n  pretrain   " in listed.stdout
    printed = run_in(folder, command, "finetune", "--config", "configs/finetune/demo_finetune.yaml", "--print-config")
    is_wheel = kind == "wheel"
    root = python.parents[1] if is_wheel else built["tree"]
    first = printed.stdout.splitlines()[0]
    assert first.startswith(f"# configs/finetune/demo_finetune.yaml is the package's, {root}/"), printed.stderr
    assert ("/ijepa_scale/_repository/configs/" in first) is is_wheel
    code = (
        "import ijepa_kernels, ijepa_scale, importlib.util as u; print(ijepa_kernels.__file__, ijepa_scale.__file__); "
    )
    code += "print([name for name in ('launch', 'configs', 'ds_configs') if u.find_spec(name)])"
    files, others = run_in(tmp_path, python, "-c", code).stdout.splitlines()
    assert all(file.startswith(str(root)) for file in files.split()) and others == "[]"


def test_an_installed_copy_claims_no_revision_of_a_repository_around_it(built: dict[str, Path], tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git isn't installed")
    python = environment_with(built["wheel"], tmp_path / "environment")
    who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    for words in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "someone's project")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, env=child_environment(GIT_CONFIG_GLOBAL="/dev/null"))
    code = "from ijepa_scale.provenance import provenance; print(provenance(device=None, processes=1)['revision'])"
    assert run_in(tmp_path, python, "-c", code).stdout == "None\n"

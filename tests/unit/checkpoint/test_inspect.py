"""Listing, verifying, comparing and removing checkpoints from the command line."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch

from ijepa_scale.checkpoint import store
from ijepa_scale.engine.protocol import Piece
from tests.unit.checkpoint.test_whole import ALONE, DAMAGE

SCRIPT = Path(__file__).parents[3] / "launch" / "checkpoint.py"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    main = runpy.run_path(str(SCRIPT))["main"]
    code = main([str(each) for each in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def write(run: Path, step: int, value: float, **extra: object) -> Path:
    pieces = [
        Piece(name=f"{kind}.w", tensor=torch.tensor([1.0, 2.0, value]), start=0, shape=(3,))
        for kind in ("model", "target")
    ]
    settings = {"config": {"optimizer": {"lr": value}, "seed": 0}, **extra}
    return store.save(run / "checkpoints", step, pieces, world=ALONE, extra=settings, keep=9)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        write(tmp_path / "run", step, float(step))
    return tmp_path / "run"


def test_ls_shows_each_and_verify_reads_all(run: Path, capsys) -> None:
    code, said = call(capsys, "ls", run)
    assert code == 0 and said.count("complete") == 3
    code, said = call(capsys, "verify", run)
    assert code == 0 and said.count("whole") == 3
    assert [line.split()[0] for line in said.splitlines()] == [
        str(run / "checkpoints" / f"step-000000{n}") for n in (10, 20, 30)
    ]
    assert call(capsys, "verify", run / "checkpoints" / "step-00000020")[1].count("whole") == 1


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds_any_damage(kind: str, run: Path, capsys) -> None:
    DAMAGE[kind](run / "checkpoints" / "step-00000020")
    code, said = call(capsys, "verify", run)
    assert code == 2 and said.count("  damaged: ") == 1 and said.count("whole") == 2
    assert len(said.splitlines()) == 3


def test_ls_shows_what_was_set_aside(run: Path, capsys) -> None:
    DAMAGE["truncated"](run / "checkpoints" / "step-00000030")
    store.newest_whole(run / "checkpoints", ALONE)
    code, said = call(capsys, "ls", run)
    assert code == 2 and "damaged-step-00000030" in said and said.count("complete") == 2


def test_diff_names_settings_and_tensors(run: Path, capsys) -> None:
    first, second = (run / "checkpoints" / f"step-000000{n}" for n in (10, 20))
    code, said = call(capsys, "diff", first, second)
    assert code == 0
    assert said.splitlines()[:2] == ["step: 10 and 20", "config.optimizer.lr: 10.0 and 20.0"]
    relative = 10 / (1 + 4 + 100) ** 0.5
    assert f"model: 1 of 1 tensors differ, by 10 at most; relative norm {relative:.3g}" in said
    copied = shutil.copytree(first, run / "copy")
    assert call(capsys, "diff", first, copied) == (
        0, "model: 0 of 1 tensors differ, by 0 at most; relative norm 0\n"
        "target: 0 of 1 tensors differ, by 0 at most; relative norm 0\n",
    )  # fmt: skip


def test_rm_removes_older_ones_only(run: Path, capsys) -> None:
    code, said = call(capsys, "rm", run, 30)
    assert code == 2 and "is the newest" in said
    code, said = call(capsys, "rm", run, 10, 11)
    assert code == 2 and "step-00000011 doesn't exist; the steps in" in said and "10, 20, 30" in said
    assert call(capsys, "rm", run, 10, 20)[0] == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000030"]


def test_a_folder_without_any_is_one_line(tmp_path: Path, capsys) -> None:
    code, said = call(capsys, "ls", tmp_path)
    assert code == 2 and len(said.splitlines()) == 1 and "has no checkpoints" in said


def test_multiples_are_kept(tmp_path: Path) -> None:
    pieces = [Piece(name="a", tensor=torch.ones(1), start=0, shape=(1,))]
    for step in range(1, 12):
        store.save(tmp_path, step, pieces, world=ALONE, extra={}, keep=2, keep_every=4)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [4, 8, 10, 11]

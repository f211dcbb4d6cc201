"""Saves that are written while training goes on: on every engine they hold the state of their step, and are shared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_scale.checkpoint import store, writing
from ijepa_scale.checkpoint.background import BackgroundSaves
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.world import World
from ijepa_scale.errors import SaveError
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES
from tests.distributed.training import full_state, make, masks_config, part

OPTIONS: dict[str, Any] = {"extra": {}, "keep": 9, "ended": lambda _: None}


def train_while_saving(world: World, engine: dict, folder: str) -> tuple[bool, list[int], bool]:
    """Returns whether the save was running after each further step, the files' bytes, and whether all is as it was."""
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(), masks_config())
    for index in range(2):
        step(part(index, world))
    saved, write, release = full_state(world, built), writing.write_tensors, []

    def slow(*args: Any) -> Any:
        while not release:
            time.sleep(0.01)
        return write(*args)

    writing.write_tensors = slow
    saves = BackgroundSaves(world)
    saves.start(Path(folder), 2, built.pieces(), **OPTIONS)
    ran = True
    for index in range(2, 4):
        step(part(index, world))
        ran = ran and saves.is_running
    release.append(1)
    path = saves.wait()
    saves.close()
    assert path is not None
    checkpoint = store.Checkpoint(path)
    moved = full_state(world, built)
    checkpoint.load(built.pieces())
    loaded = full_state(world, built)
    assert any(not torch.equal(moved[name], saved[name]) for name in saved)
    same = saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    return ran, [file.bytes for file in checkpoint.files], same


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in ("hsdp", "zero1", "zero2") else n for n in ENGINES]
)
def test_the_state_of_the_step_is_saved_while_training_goes_on(name: str, tmp_path: Path) -> None:
    processes, engine = ENGINES[name]
    for ran, sizes, same in run(train_while_saving, processes, engine, str(tmp_path)):
        assert ran and same
        assert len(sizes) == processes, "every process writes"
        if name in ("ddp", "hsdp"):
            assert max(sizes) < 1.1 * min(sizes)  # headers differ, shares don't


def fail_on_one(world: World, folder: str) -> list[str]:
    from tests.distributed.test_store import halves

    saves, said, write = BackgroundSaves(world), [], writing.write_tensors

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in (1, 2, 3):
        writing.write_tensors = full if step == 2 and world.rank == 1 else write
        saves.start(Path(folder), step, halves(float(step), world.rank), **OPTIONS)
        try:
            said.append(str(saves.wait()))
        except SaveError as error:
            said.append(str(error))
    saves.close()
    return said


def test_a_process_that_cannot_write_fails_the_save_on_all(tmp_path: Path) -> None:
    first, second = run(fail_on_one, 2, str(tmp_path))
    assert first == second
    assert first[0].endswith("step-00000001") and first[2].endswith("step-00000003")
    assert "(process 1: No space left on device; " in first[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]

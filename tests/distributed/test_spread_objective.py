"""An objective that gathers a statistic over images computes the same on any number of processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.distributed.commands import ROOT, ZERO3, finish, losses, start, write_config, write_data

ENGINES = {
    "ddp": ("engine.strategy=ddp",), "fsdp2": ("engine.strategy=fsdp2",),
    "zero2": ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero2.json"), "zero3": ZERO3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


def trained(folder: Path, data: Path, *settings: str) -> list[tuple[float, float]]:
    """Returns (loss, gradient norm) of five steps."""
    folder.mkdir()
    config = write_config(folder / "run.yaml", data, folder / "run")
    plugin = ("--plugin", "tests.distributed.spread_objective", "objective.loss=spread")
    limits = ("schedule.stop_after=5", "evaluate.every=0", "health.every=0", "checkpoint.every=0")
    path = os.pathsep.join([str(ROOT), *sys.path[1:]])
    finish(start(config, *plugin, *limits, *settings, PYTHONPATH=path), config)
    return list(losses(folder / "run").values())


@pytest.mark.long
def test_a_gathered_statistic_is_that_of_one_process(data: Path, tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", data)
    assert len(alone) == 5
    for name, settings in ENGINES.items():
        found = trained(tmp_path / name, data, "--processes", "2", *settings)
        assert found == [pytest.approx(pair, rel=1e-5) for pair in alone], name
    apart = trained(tmp_path / "apart", data, "--processes", "2", "engine.strategy=ddp", "objective.gather=false")
    assert apart[0] != pytest.approx(alone[0], rel=1e-4)

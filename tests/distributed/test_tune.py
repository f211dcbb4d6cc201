"""launch/tune.py on two processes measures several strategies, and writes the best to tuned.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale.config import load_config
from tests.distributed.commands import ROOT, finish, start, write_config

TUNE = ROOT / "launch" / "tune.py"
QUICK = (
    "--processes",
    "2",
    "--steps",
    "3",
    "--warmup",
    "1",
    "--limit",
    "2",
    "--skip",
    "compile",
    "--skip",
    "attention",
)


def test_two_processes(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", Path("nowhere"), tmp_path / "run")
    log = finish(start(config, *QUICK, "data.batch_size=2", script=TUNE, launcher=(sys.executable,)), config)
    assert "] ddp, 1 image x 1, checkpointing none, eager, attention auto: " in log
    assert "] fsdp2, 1 image x 1, " in log
    tuned = load_config(tmp_path / "run" / "tuned.yaml")
    assert tuned.engine.strategy in ("ddp", "fsdp2") and tuned.data.batch_size == 2
    assert f"tuned.yaml --processes 2\nor paste   data.batch_size=2 engine.strategy={tuned.engine.strategy}" in log
    assert "workers not measured: " in log

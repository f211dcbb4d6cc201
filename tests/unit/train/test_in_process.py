"""A run by one public call: in notebooks, under submitit, and wherever a launcher has set an environment."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ijepa_scale
from ijepa_scale.errors import ConfigError
from ijepa_scale.stopping import Stopped
from ijepa_scale.train.loop import Loop
from tests.distributed.commands import losses, write_data
from tests.unit.train.test_start import CONFIG, MODEL


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shards") / "data")


def write(tmp_path: Path, data: Path) -> Path:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(folder=tmp_path / "run", model=MODEL, data=data))
    return config


def test_the_result_is_returned(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path, data)
    result = ijepa_scale.run(config, ["schedule.epochs=1", "schedule.warmup_epochs=0"])
    assert result.steps == 3 and result.loss == losses(tmp_path / "run")[3][0]
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000003"
    assert (tmp_path / "run" / "logs" / "process-00000.log").read_text().endswith("ends: done\n")


def test_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        ijepa_scale.run(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="kind is 'pretraining'; give pretrain or finetune"):
        ijepa_scale.run(tmp_path / "missing.yaml", kind="pretraining")  # type: ignore[arg-type]


def test_a_signal_reaches_its_handler_once_the_state_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As submitit's, which requeues the job and ends the process."""
    after, saved = Loop._after, []

    def signalled(loop: Loop, done: int, *arguments: Any) -> None:
        if done == 2:
            os.kill(os.getpid(), number)
        after(loop, done, *arguments)

    monkeypatch.setattr(Loop, "_after", signalled)
    before = signal.signal(signal.SIGUSR2, lambda *_: saved.append((tmp_path / "run" / "checkpoints").exists()))
    try:
        for number, wanted in ((signal.SIGTERM, []), (signal.SIGUSR2, [True])):
            config = write(tmp_path, data)
            with pytest.raises(Stopped, match=f"{number.name}; saved"):
                ijepa_scale.run(config, [f"folder={tmp_path}/{'run' if wanted else 'other'}"])
            assert saved == wanted
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_it_is_pickled_by_name_and_importing_the_package_imports_no_torch() -> None:
    assert pickle.loads(pickle.dumps(ijepa_scale.run)) is ijepa_scale.run
    light = "import sys, ijepa_scale, ijepa_scale.cluster.jobs, ijepa_scale.train.process_log"
    code = f"{light}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_submitit_starts_it_again_with_the_same_arguments() -> None:
    pytest.importorskip("submitit", reason="submitit isn't installed")
    again = ijepa_scale.run.checkpoint("a.yaml", ["seed=1"], kind="finetune")  # type: ignore[attr-defined]
    assert again.function is ijepa_scale.run
    assert again.args == ("a.yaml", ["seed=1"]) and again.kwargs == {"kind": "finetune"}

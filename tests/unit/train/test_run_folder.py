"""A run's folder: one run at a time, refused before anything is built, one line when the disk takes no more."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ijepa_scale.checkpoint.store import write_safetensors
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.train.processes import user_errors
from ijepa_scale.train.run_folder import LOCK, held

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
HOLD = """
import sys, pathlib, torch
from ijepa_scale.engine.world import World
from ijepa_scale.train.run_folder import held
world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
with held(pathlib.Path(sys.argv[1]), world):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with held(folder, ALONE):
        since = r"on .+ since [0-9: -]+"
        text = rf"folder {folder} is in use by process {os.getpid()} {since}; wait for it, or set another folder"
        with pytest.raises(ConfigError, match=text), held(folder, ALONE):
            pass
        assert (folder / LOCK).exists()
        (folder / "kept").touch()
    assert os.listdir(folder) == ["kept"]
    with held(folder, ALONE):
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on"), held(tmp_path, ALONE):
            pass
        other.kill()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path, ALONE):
        pass


def test_a_run_that_writes_nothing_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    for name in ("before", "new"):
        with held(tmp_path / name, ALONE):
            pass
    assert os.listdir(tmp_path) == ["before"]


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch, caplog) -> None:  # noqa: ANN001
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path, ALONE):
        pass
    assert f"{tmp_path} can't be locked (No locks available): start no second run in it" in caplog.text


def test_a_folder_that_cannot_be_made_is_refused_on_every_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=rf"folder {folder} can't be used \(.+\); set folder to one that can"):
            with held(folder, ALONE):
                pass

    class Second(World):
        def broadcast_object(self, value: object) -> object:
            assert value is None
            return "the main process's problem"

    second = Second(rank=1, size=2, local_rank=1, local_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="the main process's problem"), held(tmp_path / "none", second):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors(3):
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error (process 3): run/metrics.jsonl can't be written (No space left on device); free space, fix the "
        "permissions, or name another place; earlier checkpoints are intact\n"
    )
    with pytest.raises(FileNotFoundError), user_errors(0):  # a fault of the program keeps its traceback
        raise FileNotFoundError(errno.ENOENT, "No such file")


def test_tensors_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(path))} can't be written \(.*; earlier checkpoints are intact"
    ):
        write_safetensors({"a": torch.zeros(1)}, path)

"""What runs and commands write has the permissions that the user's umask gives to new files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ijepa_scale.train.finetune import finetune
from ijepa_scale.train.pretrain import pretrain
from launch import export, report
from tests.unit.test_new_file import check_modes
from tests.unit.train import test_finetune_run as finetuning
from tests.unit.train import test_start as pretraining


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.long
@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022], ids=oct)
def test_runs_exports_and_reports_have_the_users_umask(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        data = finetuning.write_colors(tmp_path / "shards")
        result = pretrain(pretraining.configure(tmp_path, data, "logging.tensorboard=true"), pretraining.ALONE)
        (tmp_path / "fine").mkdir()
        finetune(finetuning.configure(tmp_path / "fine", data, "schedule.epochs=1", "schedule.warmup_epochs=0"),
                 pretraining.ALONE)  # fmt: skip
        run = str(result.checkpoint.parents[1])
        assert export.main([run, "--to", str(tmp_path / "encoder.safetensors")]) == 0
        assert export.main([run, "--to", str(tmp_path / "jepa.pth.tar"), "--steps-per-epoch", "3"]) == 0
        assert report.main([run, "--to", str(tmp_path / "report.html"), "--no-pictures"]) == 0
    check_modes(tmp_path, mask)

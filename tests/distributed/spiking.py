"""Real runs of pretraining whose gradients are multiplied at chosen steps, for tests of spikes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ijepa_scale.checkpoint import store
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.world import World
from ijepa_scale.errors import UserError
from ijepa_scale.metrics.own_time import SLOWEST
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.train.pretrain import PretrainTask, pretrain

CONFIG = """
folder: {folder}
model: {{name: vit_tiny, image_size: 16, patch_size: 4, width: 24, depth: 2, heads: 2, predictor_width: 12,
  predictor_depth: 1}}
masks: {{min_keep: 1, group_size: 8, target_scale: [0.2, 0.4]}}
data: {{train: {data}, batch_size: 8, workers: 0}}
augment: {{mean: [0.4, 0.5, 0.6], std: [0.3, 0.3, 0.3]}}
optimizer: {{lr: 1e-3}}
schedule: {{epochs: 2, warmup_epochs: 1, steps_per_epoch: 18, momentum: [0.9, 1.0]}}
engine: {{device: cpu, precision: fp32, strategy: plain}}
logging: {{every: 1, tensorboard: false, progress: none}}
checkpoint: {{every: 8}}
health: {{every: 0, keep_best: none}}
spikes: {{window: 20}}
"""
FACTOR = 1e4  # of a spike's gradients; its loss is as always


class Killed(Exception):
    """The run is ended without notice."""


def configured(path: Path, data: Path, folder: Path, *settings: str) -> PretrainConfig:
    path.write_text(CONFIG.format(folder=folder, data=data))
    return load_config(path, settings)


def train(
    world: World,
    path: Path,
    settings: tuple[str, ...],
    spikes: Mapping[int, tuple[float, int | None]],
    *,
    late: bool = False,
    kill: int | None = None,
) -> str:
    """Trains by a configuration, and returns the error that ended the run, if any.

    `spikes` gives the factor of the gradients by step, and the process of it, None for all. With `late` the device
    decides, as on a GPU. Ends the run without notice in the step `kill`.
    """
    build, step = PretrainTask.__init__, PretrainTask.step

    def building(task: PretrainTask, *args: Any, **options: Any) -> None:
        build(task, *args, **options)
        if late:
            task.engine._watch = FiniteWatch(world, late=True)  # type: ignore[attr-defined]

    def stepping(task: PretrainTask, batch: Batch) -> Any:
        if batch.step == kill:
            raise Killed
        factor, process = spikes.get(batch.step, (1.0, None))
        if process not in (None, world.rank):
            factor = 1.0
        backward = type(task.engine).backward
        record = task.engine._watch.record  # type: ignore[attr-defined]

        def scaled(loss: torch.Tensor) -> None:
            with mock.patch.object(task.engine._watch, "record", lambda _: record(loss)):  # type: ignore[attr-defined]
                backward(task.engine, loss * factor)  # type: ignore[arg-type]

        with mock.patch.object(task.engine, "backward", scaled):
            return step(task, batch)

    with mock.patch.object(PretrainTask, "__init__", building), mock.patch.object(PretrainTask, "step", stepping):
        try:
            pretrain(load_config(path, settings), world)
        except (UserError, Killed) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows without what the clock says."""
    timed = ("data_wait_ms", "step_ms", "images_per_s", "mfu", *SLOWEST)
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(folder / "metrics.jsonl")]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of the newest checkpoint."""
    path = store.newest(folder / "checkpoints")
    assert path is not None
    return store.Checkpoint(path).full("")


def left_out(folder: Path) -> int:
    """Returns how many steps the newest checkpoint says were left out."""
    path = store.newest(folder / "checkpoints")
    assert path is not None
    extra = store.Checkpoint(path).extra
    assert extra["steps_before"] == -extra["spikes"]["skipped"]
    return int(extra["spikes"]["skipped"])

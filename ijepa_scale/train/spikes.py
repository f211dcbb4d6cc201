"""Loads the state of a checkpoint into a task, at the start of a run and to go back after a spike."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.folder import named, step_of
from ijepa_scale.checkpoint.manifest import Damage
from ijepa_scale.metrics.row import Row
from ijepa_scale.train.task import Task

logger = logging.getLogger(__name__)


def load_state_of(checkpoint: store.Checkpoint, task: Task, *, returning: bool = False) -> None:
    """Loads weights, optimiser, target and what the judge knows.

    `returning` to a checkpoint, the judge still counts what happened after it.
    """
    checkpoint.load(task.engine.pieces())
    before = checkpoint.extra.get("steps_before", 0)  # less the steps that were left out
    task.engine.loaded(checkpoint.step + before)
    state = checkpoint.extra.get("spikes")  # not stored by version 0.1.0
    if state is not None:
        task.spikes.load_state(state, returning=returning)
    task.steps_before = before + _skipped(checkpoint)


def _skipped(checkpoint: store.Checkpoint) -> int:
    """Returns how many of the steps before the checkpoint were left out."""
    return checkpoint.extra.get("spikes", {"skipped": 0})["skipped"]


def roll_back(task: Task, resumed: Path | None) -> Row:
    """Goes back to the newest whole checkpoint without the judge's spike, and returns the row that says so.

    The batches since that checkpoint are left out, so a step's number is still that of its batch and of its schedules.
    Without a checkpoint, only the step with the spike is left out: it has changed nothing. Communicates. No save may be
    running.

    Raises:
        SpikeError: the run has gone back there too often.
    """
    spiked = task.spikes.roll_back
    assert spiked is not None
    checkpoint = _newest_before(task, spiked, resumed)
    if checkpoint is None:
        task.spikes.rolled_back(None)
        then = "there is no checkpoint to go back to yet, so only this step is left out"
    else:
        task.spikes.rolled_back(checkpoint.step, skipped=_skipped(checkpoint))
        load_state_of(checkpoint, task, returning=True)
        then = f"went back to {checkpoint.path}, and leaves out the steps from {checkpoint.step} to {spiked}"
    if task.world.is_main:
        logger.warning("%s; %s (spikes.action=rollback)", task.spikes.found, then)
    return {
        "step": spiked + 1,
        "rolled_back_to": None if checkpoint is None else checkpoint.step,
        "steps_skipped": task.spikes.skipped,
    }


def _newest_before(task: Task, step: int, resumed: Path | None) -> store.Checkpoint | None:
    """Returns the run's newest whole checkpoint without `step`, or else the one it began with. Communicates."""
    found = named(Path(task.config.folder) / "checkpoints") if task.world.is_main else []
    paths = task.world.broadcast_object([path for path in found if step_of(path) <= step])
    for path in (*reversed(cast(list[Path], paths)), *(() if resumed is None else [resumed])):
        try:
            return store.whole(path, task.world)
        except Damage as error:
            logger.warning("%s", error)
    return None

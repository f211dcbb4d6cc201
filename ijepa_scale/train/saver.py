"""Saves the state of a run, and lets it go on where that fails. Must not know any kind of training."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, cast

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.folder import named, step_of
from ijepa_scale.checkpoint.manifest import Damage
from ijepa_scale.engine.replicas import check_replicas
from ijepa_scale.errors import SaveError
from ijepa_scale.train.task import Task

logger = logging.getLogger(__name__)

_PAUSE = 10  # seconds before the last save of a run is tried again


class Saver:
    """Writes the checkpoints of a run. Every process has one, and calls it alike."""

    def __init__(self, task: Task, folder: Path, versions: dict[str, Any]) -> None:
        self._task, self._folder, self._versions = task, folder, versions
        self._config = task.config.checkpoint
        self._failures = 0  # one after another
        self._newest: Path | None = None  # what this run has written or continued last

    def continues(self, checkpoint: store.Checkpoint) -> None:
        """Call with the checkpoint that the run goes on from."""
        own = self.path(checkpoint.step)
        self._newest = own if checkpoint.path.resolve() == own.resolve() else None

    def path(self, done: int) -> Path:
        """Returns the path of the checkpoint after `done` steps."""
        return self._folder / "checkpoints" / f"step-{done:08d}"

    def has(self, done: int) -> bool:
        """Returns whether the state after `done` steps is the newest checkpoint."""
        return self._newest == self.path(done)

    def newest_before(self, step: int, resumed: Path | None = None) -> store.Checkpoint | None:
        """Returns the run's newest whole checkpoint without `step`, or else the one it began with. Communicates."""
        found = named(self._folder / "checkpoints") if self._task.world.is_main else []
        paths = self._task.world.broadcast_object([path for path in found if step_of(path) <= step])
        for path in (*reversed(cast(list[Path], paths)), *(() if resumed is None else [resumed])):
            try:
                return store.whole(path, self._task.world)
            except Damage as error:
                logger.warning("%s", error)
        return None

    def save(
        self,
        done: int,
        *,
        name: str = "checkpoints",
        keep: int | None = None,
        evaluated: bool = True,
        last: bool = False,
    ) -> None:
        """Saves the state after `done` steps. Communicates.

        A failure is logged, and the next save that is due is the next attempt; the `last` one is tried again at once.
        Not `evaluated`: an evaluation of this state will follow.

        Raises:
            ReplicaError: processes' copies of the state differ; nothing is saved.
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        task, most = self._task, self._config.max_failures
        folder, extra = self._folder / name, self._extra(evaluated=evaluated)
        kept = {"keep": keep} if keep else {"keep": self._config.keep, "keep_every": self._config.keep_every}
        check_replicas(task.engine.pieces(working=True), task.world)
        while True:
            try:
                path = store.save(folder, done, task.engine.pieces(), world=task.world, extra=extra, **kept)
                break
            except SaveError as error:
                self._failures += 1
                if self._failures >= most:
                    raise
                is_last = last or done >= task.last_step
                then = f"trying again in {_PAUSE} s" if is_last else "training goes on until the next save"
                if task.world.is_main:
                    logger.error("%s; %s (failure %d in a row, %d end the run)", error, then, self._failures, most)
                if not is_last:
                    return
                time.sleep(_PAUSE)
        self._failures = 0
        if name == "checkpoints":
            self._newest = path
        if task.world.is_main:
            logger.info("saved %s", path)

    def evaluated(self, done: int) -> None:
        """Tells the checkpoint after `done` steps, if there is one, that this state was evaluated, and the result."""
        if not self.has(done) or not self._task.world.is_main:
            return
        path = self.path(done)
        try:
            store.amend(path, self._extra(evaluated=True))
        except OSError as error:
            logger.error("%s can't take the result of its evaluation (%s), which resuming repeats", path, error)

    def keep_from_resuming(self, done: int) -> None:
        """Moves the checkpoint after `done` steps, if there is one, to `stopped`, where resuming doesn't look."""
        if self.has(done) and self._task.world.is_main:
            aside = self._folder / "stopped" / self.path(done).name
            aside.parent.mkdir(exist_ok=True)
            store.put(self.path(done), aside)

    def _extra(self, *, evaluated: bool) -> dict[str, Any]:
        """Returns what is saved beside the tensors."""
        task = self._task
        return {
            "kind": task.kind,
            "identity": task.identity(),
            "config": task.config.values(),
            "versions": self._versions,
            "init": task.origin,
            "evaluated_here": evaluated,
            "spikes": task.spikes.state(),
            "steps_before": task.steps_before - task.spikes.skipped,
            **task.state(),
        }

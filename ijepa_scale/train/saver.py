"""Saves the state of a run, and lets it go on where that fails. Must not know any kind of training."""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.background import BackgroundSaves
from ijepa_scale.checkpoint.folder import named, step_of
from ijepa_scale.checkpoint.manifest import Damage
from ijepa_scale.engine.replicas import check_replicas
from ijepa_scale.errors import SaveError
from ijepa_scale.train.task import Task

logger = logging.getLogger(__name__)

_PAUSE = 10  # seconds before the last save of a run is tried again


class Saver:
    """Writes the checkpoints of a run. Every process has one, and calls it alike.

    With `checkpoint.asynchronous`, a save is written while training goes on. Its result counts from the next call on,
    so that all processes learn of it at the same step.
    """

    def __init__(self, task: Task, folder: Path, versions: dict[str, Any]) -> None:
        """Communicates."""
        self._task, self._folder, self._versions = task, folder, versions
        self._config = task.config.checkpoint
        self._background = BackgroundSaves(task.world) if self._config.asynchronous else None
        self._failures = 0  # one after another
        self._newest: Path | None = None  # what this run has written or continued last
        self._name = ""  # of the folder that the last save is written into

    def continues(self, checkpoint: store.Checkpoint) -> None:
        """Call with the checkpoint that the run goes on from."""
        own = self.path(checkpoint.step)
        self._newest = own if checkpoint.path.resolve() == own.resolve() else None

    def path(self, done: int) -> Path:
        """Returns the path of the checkpoint after `done` steps."""
        return self._folder / "checkpoints" / f"step-{done:08d}"

    def has(self, done: int) -> bool:
        """Returns whether the state after `done` steps is the newest checkpoint. Waits for the last save.

        Raises:
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        self._settle()
        return self._newest == self.path(done)

    def newest_before(self, step: int, resumed: Path | None = None) -> store.Checkpoint | None:
        """Returns the run's newest whole checkpoint without `step`, or else the one it began with. Communicates.

        Waits for the last save.

        Raises:
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        self._settle()
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
        is_last: bool = False,
    ) -> None:
        """Saves the state after `done` steps. Communicates, and waits for the save before.

        A failure is logged, and the next save that is due is the next attempt; after the `is_last` one, `finish` is.
        Not `evaluated`: an evaluation of this state will follow.

        Raises:
            ReplicaError: processes' copies of the state differ; nothing is saved.
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        begin, task = time.perf_counter(), self._task
        if self._background is not None and self._background.is_running and task.world.is_main:
            logger.warning(
                "the save before that of step %d isn't done, so training waits; raise checkpoint.every, or use a "
                "faster disk", done,
            )  # fmt: skip
        self._settle()
        check_replicas(task.engine.pieces(working=True), task.world)
        options = {"keep": keep} if keep else {"keep": self._config.keep, "keep_every": self._config.keep_every}
        extra = copy.deepcopy(self._extra(evaluated=evaluated))
        into, pieces, self._name = self._folder / name, task.engine.pieces(), name
        waited: list[float] = []
        tell = partial(self._tell, begin=begin, waited=waited, is_last=is_last or done >= task.last_step)
        if self._background is not None:
            self._background.start(into, done, pieces, extra=extra, ended=tell, **options)
            waited.append(time.perf_counter() - begin)
            return
        saved: Future[Path] = Future()
        try:
            saved.set_result(store.save(into, done, pieces, world=task.world, extra=extra, **options))
        except SaveError as error:
            saved.set_exception(error)
        tell(saved)
        self._count(saved)

    def finish(self, done: int, *, evaluated: bool = True, pause: bool = False) -> None:
        """Saves the state after `done` steps, unless it is saved, and waits. Tries again until it is. Communicates.

        With `pause`, an attempt has just failed if the state isn't saved, so the next one waits as those after it do.

        Raises:
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        while not self.has(done):
            if pause:
                time.sleep(_PAUSE)
            self.save(done, evaluated=evaluated, is_last=True)
            pause = True

    def close(self) -> None:
        """Waits for the last save, of which a failure was logged, and frees its memory."""
        if self._background is not None:
            self._background.close()

    def _settle(self) -> None:
        """Waits for the last save, if it is being written, and counts it."""
        if self._background is None:
            return
        saved: Future[Path] = Future()
        try:
            path = self._background.wait()
            if path is None:
                return
            saved.set_result(path)
        except SaveError as error:
            saved.set_exception(error)
        self._count(saved)

    def _count(self, saved: Future[Path]) -> None:
        error = saved.exception()
        if error is not None:
            self._failures += 1
            if self._failures >= self._config.max_failures:
                raise error
            return
        self._failures = 0
        if self._name == "checkpoints":
            self._newest = saved.result()

    def _tell(self, saved: Future[Path], begin: float, waited: list[float], *, is_last: bool) -> None:
        """Logs how a save ended, as soon as it has, perhaps in its thread."""
        error, took = saved.exception(), time.perf_counter() - begin
        if not self._task.world.is_main:
            return
        if error is None:
            stall = waited[0] if waited else took
            logger.info("saved %s (%.1f s, of which training waited %.2f s)", saved.result(), took, stall)
        elif isinstance(error, SaveError):
            number, most = self._failures + 1, self._config.max_failures
            if number >= most:
                then = "the run ends"
            else:
                then = f"trying again in {_PAUSE} s" if is_last else "training goes on until the next save"
            logger.error("%s; %s (failure %d in a row, %d end the run)", error, then, number, most)

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

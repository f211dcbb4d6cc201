"""Saves the state of a run, and lets it go on where that fails. Must not know any kind of training."""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.background import BackgroundSaves
from ijepa_scale.engine.replicas import check_replicas
from ijepa_scale.errors import SaveError
from ijepa_scale.train.task import Task

logger = logging.getLogger(__name__)

_PAUSE = 10  # seconds before the last save of a run is tried again
_NEXT = {"best": "this state isn't kept as the best", "stopped": "the run ends without it"}


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
        self._name, self._step = "", -1  # the folder that the last save is written into, and its step
        self._last: Path | None = None  # what the last save has written
        self._open_row: dict[str, list[list[float]]] = {}  # the meters' sums, where it is between two rows

    def continues(self, checkpoint: store.Checkpoint) -> None:
        """Call with the checkpoint that the run goes on from."""
        own = self.path(checkpoint.step)
        self._newest = own if checkpoint.path.resolve() == own.resolve() else None

    def path(self, done: int) -> Path:
        """Returns the path of the checkpoint after `done` steps."""
        return self._folder / "checkpoints" / f"step-{done:08d}"

    def has(self, done: int, *, name: str = "checkpoints") -> bool:
        """Returns whether the state after `done` steps is the newest of its folder. Waits for the last save.

        Raises:
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        self.settle()
        return (self._newest if name == "checkpoints" else self._last) == self._folder / name / self.path(done).name

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
        One that would be the last of `checkpoint.max_failures` in a row is waited for. Not `evaluated`: an evaluation
        of this state will follow.

        Raises:
            ReplicaError: processes' copies of the state differ; nothing is saved.
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
        begin, task = time.perf_counter(), self._task
        is_late = self._background is not None and self._background.is_running and self._step != done
        if is_late and name == "checkpoints" and task.world.is_main:
            logger.warning(
                "the save of step %d isn't done when that of step %d is due, so training waits; raise "
                "checkpoint.every, or use a faster disk", self._step, done,
            )  # fmt: skip
        self.settle()
        check_replicas(task.engine.pieces(working=True), task.world)
        options = {"keep": keep} if keep else {"keep": self._config.keep, "keep_every": self._config.keep_every}
        self._open_row = task.meters.state(task.world.gather)
        extra = copy.deepcopy(self._extra(evaluated=evaluated))
        into, pieces = self._folder / name, task.engine.pieces()
        self._name, self._step, self._last = name, done, None
        waited: list[float] = []
        number, most = self._failures + 1, self._config.max_failures
        then = "the run ends" if number >= most else _NEXT.get(name, "training goes on until the next save")
        if number < most and name == "checkpoints" and (is_last or done >= task.last_step):
            then = f"trying again in {_PAUSE} s"
        tell = partial(
            self._tell, begin=begin, waited=waited, then=f"{then} (failure {number} in a row, {most} end the run)"
        )
        if self._background is not None:
            self._background.start(into, done, pieces, extra=extra, ended=tell, **options)
            waited.append(time.perf_counter() - begin)
            if number >= most:
                self.settle()
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

    def settle(self) -> None:
        """Waits for the last save, if it is being written, and counts it.

        Raises:
            SaveError: `checkpoint.max_failures` saves have failed one after another; raised on every process.
        """
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
        self._failures, self._last = 0, saved.result()
        if self._name == "checkpoints":
            self._newest = self._last

    def _tell(self, saved: Future[Path], *, begin: float, waited: list[float], then: str) -> None:
        """Logs how a save ended, as soon as it has, perhaps in its thread."""
        error, took, world = saved.exception(), time.perf_counter() - begin, self._task.world
        if error is None and world.is_main:
            stall = waited[0] if waited else took
            logger.info("saved %s (%.1f s, of which training waited %.2f s)", saved.result(), took, stall)
        elif isinstance(error, SaveError) and world.is_main:
            logger.error("%s; %s", error, then)
        elif error is not None and not isinstance(error, SaveError):
            logger.error("process %d: a save ended by %r", world.rank, error)

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
            "open_row": self._open_row,
            "steps_before": task.steps_before - task.spikes.skipped,
            **task.state(),
        }

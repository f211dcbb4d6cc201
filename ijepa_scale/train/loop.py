"""The loop of every training run: steps, rows, evaluations, checkpoints. Must not know models or objectives.

Everything that differs between kinds of training belongs to a `Task`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ijepa_scale import environment, stopping
from ijepa_scale.checkpoint import store
from ijepa_scale.config import to_yaml
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.sanity import sanity_warnings
from ijepa_scale.data.sources.source import described
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.workers import Recovery, set_recovery
from ijepa_scale.engine.agreement import check_alike
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CollapseError, ConfigError, NonFiniteError, ReplicaError, SaveError, SpikeError
from ijepa_scale.metrics.progress import Progress
from ijepa_scale.metrics.row import Row
from ijepa_scale.metrics.sinks import JSONL_NAME, Sinks, open_sinks
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.plurals import counted
from ijepa_scale.provenance import provenance
from ijepa_scale.stopping import Stopped
from ijepa_scale.train.initial import with_init
from ijepa_scale.train.link_watch import LinkWatch
from ijepa_scale.train.process_log import process_log
from ijepa_scale.train.resuming import check_continues, find_checkpoint
from ijepa_scale.train.run_curves import draw_curves
from ijepa_scale.train.run_folder import held
from ijepa_scale.train.saver import Saver
from ijepa_scale.train.setup import check_host_memory, pixels_of
from ijepa_scale.train.spikes import load_state_of, roll_back
from ijepa_scale.train.task import Result, Task
from ijepa_scale.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def run_task(kind: type[Task], config: Any, world: World) -> Result:
    """Runs a task of this kind, starting from the newest checkpoint if there is one, and returns the result.

    Every process must call it.

    Raises:
        UserError: a problem that the user can fix. Saved data is never lost.
    """
    set_recovery(Recovery(config.data.worker_restarts, config.data.worker_timeout))
    folder, links = Path(config.folder), LinkWatch(world, config.engine.link_timeout)
    with links.watching(), held(folder, world), process_log(folder, world.rank, world.size):
        resume = find_checkpoint(config, world)
        config = with_init(config)
        if resume is not None and config.model.init is not None:
            logger.info("model.init=%s isn't read again: the run goes on from %s", config.model.init, resume.path)
        task = kind(config, world, starting=resume is None)
        check_alike(world, {"what is in data.train": described(task.source)})
        loop = Loop(task, resume)
        task.prepare_evaluation()
        with stopping.listening(), loop.watchdog.watching():
            loop.train()
        return task.result(steps=loop.steps, loss=loop.loss, checkpoint=loop.checkpoint)


class Loop:
    """Takes the steps of a run, and writes its files.

    The run's folder gets config.yaml, run.json, metrics.jsonl, tensorboard/ and checkpoints/.
    """

    def __init__(self, task: Task, resume: store.Checkpoint | None) -> None:
        self.task, self.folder = task, Path(task.config.folder)
        self.world, self.config = task.world, task.config
        self.start = task.first_step
        self.resumed = None if resume is None else resume.path
        self.loss: float | None = None  # of the last row
        self._events: list[Row] = []  # rows of what happened in the last step
        self._evaluation_due = False  # the run was stopped between a save and the evaluation of the same state
        self.provenance = self._provenance() if self.world.is_main else {}
        self.spikes = task.spikes = SpikeJudge(self.config.spikes, run=str(self.folder), log=self.world.is_main)
        task.engine.judged_by(self.spikes)
        self.saver = Saver(task, self.folder, self.provenance)
        self.watchdog = Watchdog(self.folder, self.world, self.config.engine.hang_timeout)
        task.engine.before_waiting = task.meters.own_time.end
        if resume is not None:
            self._resume(resume)

    def _provenance(self) -> dict[str, Any]:
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        hosts = [
            {"name": member.host, "address": member.address, "process": member.rank, "pid": member.pid}
            for member in self.world.members
        ]
        return {
            **provenance(device=name, processes=self.world.size),
            "launcher": self.world.launcher,
            "job": environment.job(),
            "members": hosts,
        }

    def _resume(self, checkpoint: store.Checkpoint) -> None:
        path = checkpoint.path
        check_continues(checkpoint, self.task)
        load_state_of(checkpoint, self.task)
        self.start = checkpoint.step
        self.task.origin = checkpoint.extra.get("init")
        self._evaluation_due = not checkpoint.extra.get("evaluated_here", True)  # version 0.1.0 evaluated first
        self.task.load_state(checkpoint.extra)
        self.task.meters.load_state(checkpoint.extra.get("open_row", {}), self.world.rank, self.world.size)
        self.saver.continues(checkpoint)
        logger.info("resumed from %s: the next step is %d", path, self.start)
        if isinstance(self.task.source, StreamSource):
            logger.warning(
                "data.reader stream doesn't save its position: at step %d new passes over the shards begin, so some "
                "samples may repeat before others have been read (data.reader=shards resumes exactly)",
                self.start,
            )

    @property
    def steps(self) -> int:
        """The number of steps done at the end of the run."""
        return max(self.task.last_step, self.start)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the state at the end of the run."""
        last = self.task.last_step
        return self.resumed if self.resumed and self.start >= last else self.saver.path(last)

    def train(self) -> None:
        """Takes the remaining steps.

        Raises:
            UserError: a problem that the user can fix. Saved data is never lost.
        """
        task, last = self.task, self.task.last_step
        if last == 0:
            raise ConfigError("the run has 0 steps; give more epochs or a larger stop_after")
        if self.resumed is None and self.start >= last:
            raise ConfigError(
                f"model.init goes on at step {self.start}, but the run ends at step {last}; give more schedule.epochs, "
                "or set model.init_state=weights to start at step 0"
            )
        if self.world.is_main:
            self._describe()
        mode = self.config.logging.progress if self.world.is_main else "none"
        with self._closing_saver(), open_sinks(
            self.folder,
            rank=self.world.rank,
            logging=self.config.logging,
            drop_from=self.start + 1 if self.resumed else 0,
            run=self.config.values(),
        ) as sinks, Progress(last, mode=mode, first_step=self.start) as progress:  # fmt: skip
            if self.resumed is None and task.evaluates(task.first_step):
                self._evaluate(task.first_step, sinks, progress)
            if self._evaluation_due and task.evaluates(self.start):
                self._evaluate(self.start, sinks, progress)
            loader = task.loader(self.start)
            check_host_memory(loader, self.world)
            for batch in task.meters.timed(self.watchdog.batches(loader)):
                if self.resumed is None and batch.step == task.first_step:
                    with task.meters.paused():
                        if self.world.is_main:
                            self._look_at(batch)
                        for name in task.first_batch(batch, self.folder):
                            sinks.picture(name, self.folder / f"{name}.png", batch.step)
                leaving = self._warm_up(batch) if batch.step == self.start else self._step(batch)
                self._after(batch.step + 1, sinks, progress)
                if leaving and batch.step + 1 < last:
                    self._leave(batch.step + 1)
            if self.start < last:
                with self.watchdog.paused("saving"):
                    self.saver.finish(last, pause=True)
        self._check_bad(loader)
        task.finish(self.folder)
        if self.world.is_main:
            draw_curves(self.folder)

    @contextmanager
    def _closing_saver(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self.watchdog.paused("saving"):  # the last save may take its time
                self.saver.close()

    def _check_bad(self, loader: TrainLoader) -> None:
        """Checks the bad samples of the whole run, since each process judges its own only after many. Communicates.

        Raises:
            DataError: over all processes they are more than `data.max_bad_fraction`; raised on every process.
        """
        counts = torch.tensor([loader.num_bad, loader.num_seen], device=self.world.device)
        bad, seen = self.world.gather(counts).sum(dim=0).tolist()  # host sync: once per run
        self.world.barrier()  # the last collective of a run
        loader.check_bad(bad, seen)

    def _look_at(self, batch: Batch) -> None:
        """Warns of images and labels that can hardly be meant."""
        config = self.task.config
        mean, std = config.augment.normalisation
        for line in sanity_warnings(
            self.task.source, batch, mean=mean, std=std, exif=config.data.exif, pixels=pixels_of(config)
        ):
            logger.warning("%s", line)

    def _leave(self, done: int) -> None:
        """Saves the state after `done` steps, unless it is saved, and ends the run. Every process must call it.

        Raises:
            Stopped: always, once the state is saved.
        """
        with self.watchdog.paused("saving"):
            self.saver.finish(done, evaluated=not self.task.evaluates(done))
        self.world.barrier()  # the last collective
        raise Stopped(f"{_why()}; saved {self.saver.path(done)}: start the same command again to go on")

    def _warm_up(self, batch: Batch) -> bool:
        """Takes the first step of this process, which compiles and allocates. The rows don't count its time."""
        with self.task.meters.warming_up():
            leaving = self._step(batch)
        if self.world.is_main:
            self._describe_run(warm_up_s=self.task.meters.warm_up_s)
            logger.info("warmed up in %.1f s (not counted in any row)", self.task.meters.warm_up_s)
        return leaving

    def _step(self, batch: Batch) -> bool:
        """Takes one step, and returns whether the run was asked to stop.

        If a value isn't finite, saves the unchanged state from before the bad step.
        """
        try:
            leaving = self.task.step(batch).leaving
            if leaving or self._needs_result(batch.step + 1):
                self.task.engine.settle()
            spiked = self.spikes.roll_back
            if spiked is not None:
                with self.watchdog.paused("loading"):
                    self.saver.settle()
                    self._events.append(roll_back(self.task, self.resumed))
        except (NonFiniteError, SpikeError) as error:  # raised on every process, so all of them can save
            if error.step > self.start:
                # not with the checkpoints: this state may already diverge, and resuming must not choose it
                try:
                    with self.watchdog.paused("saving"):
                        self.saver.save(error.step, name="stopped", keep=1)
                except (SaveError, ReplicaError) as unsaved:  # the bad step is what ends the run
                    logger.error("%s", unsaved)
            raise
        # a GPU's spike is known a step later, and that step, which changed nothing, is taken again
        return leaving if spiked is None or spiked == batch.step else self._step(batch)

    def _needs_result(self, done: int) -> bool:
        """Returns whether a row, an evaluation or a checkpoint is due after `done` steps."""
        return self._shows(done) or self._saves(done) or self.task.evaluates(done)

    def _shows(self, done: int) -> bool:
        return done % self.config.logging.every == 0 or done == self.task.last_step

    def _saves(self, done: int) -> bool:
        every = self.config.checkpoint.every
        return (every and done % every == 0) or done == self.task.last_step

    def _after(self, done: int, sinks: Sinks, progress: Progress) -> None:
        """Writes the row, evaluates and saves if they are due after `done` steps."""
        task = self.task
        progress.advance()
        while self._events:
            sinks.write(self._events.pop(0))
        if self._shows(done):
            row = task.row(task.meters.flush(self.world.mean, self.world.gather), done) | self.spikes.row()
            if self.world.device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
            if row["loss"] is not None and math.isnan(row["loss"]):  # no step of it was taken
                row["loss"] = None
            self.loss = row["loss"]
            sinks.write(row)
            progress.show(row)
        with task.meters.paused(), self.watchdog.paused("saving"):
            if self._saves(done):  # first, since an evaluation can fail
                self.saver.save(done, evaluated=not task.evaluates(done))
            if task.evaluates(done):
                self._evaluate(done, sinks, progress)

    def _evaluate(self, done: int, sinks: Sinks, progress: Progress) -> None:
        """Evaluates the state after `done` steps, and tells the checkpoint of that state, if there is one."""
        try:
            with self.watchdog.paused("evaluating"):
                found = self.task.evaluate(done)
        except Stopped:
            if done == self.task.first_step and self.resumed is None:
                raise Stopped(f"{_why()}; no step was taken") from None
            self._leave(done)
            raise
        row = {"step": done, **found.row}
        if not (self.world.is_main and self.resumed and done == self.start and self._is_written(row)):
            sinks.write(row)
        progress.note(f"step {done}  {found.note}")
        if found.stops is not None:
            self.saver.keep_from_resuming(done)
            self.world.barrier()  # the last collective of a run
            raise CollapseError(
                f"{found.stops}. The run ends here, and its checkpoints, if any, are from before; set "
                "health.on_collapse=warn to train on"
            )
        if found.is_best:
            self.saver.save(done, name="best", keep=1)
            if not self.saver.has(done, name="best"):
                self.task.forget_best()
        self.saver.evaluated(done)  # last, so that a run that is killed before repeats all of it

    def _is_written(self, row: dict[str, Any]) -> bool:
        """Returns whether a run that was killed after an evaluation had written its row."""
        return any(row.items() <= old.items() for old in read_rows(self.folder / JSONL_NAME))

    def _describe(self) -> None:
        """Writes config.yaml and run.json, and renames rows and best state of an earlier run without checkpoints."""
        rows = self.folder / JSONL_NAME
        # otherwise an old best state could have the highest step and be taken for this run's
        for left in (rows, self.folder / "best") if self.resumed is None else ():
            if left.exists():
                names = (left.with_name(f"{left.stem}-{number}{left.suffix}") for number in count(1))
                aside = next(name for name in names if not name.exists())
                left.rename(aside)
                logger.warning("%s belongs to a run without checkpoints; renamed it to %s", left, aside.name)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        self._describe_run()
        logger.info(
            "%s: %s, batch %d, %s, %d of them done; %s in %s on %d x %s",
            self.folder, self.task.source.summary(), self.task.batch_size, counted(self.task.last_step, "step"),
            self.start, self.config.engine.strategy, self.config.engine.precision, self.world.size,
            self.world.device.type,
        )  # fmt: skip

    def _describe_run(self, **measured: float | None) -> None:
        """Writes run.json: versions and measurements."""
        described = {**self.provenance, "init": self.task.origin, **measured}
        (self.folder / "run.json").write_text(json.dumps(described, indent=2) + "\n")


def _why() -> str:
    return stopping.reason() or "another process was asked to stop"

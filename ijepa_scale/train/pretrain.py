"""The pretraining loop: steps, rows, evaluations, checkpoints. Floor 4."""

from __future__ import annotations

import dataclasses
import json
import logging
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.checkpoint import store
from ijepa_scale.config import PretrainConfig, to_yaml
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.stream import StreamSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError, NonFiniteError
from ijepa_scale.evaluate.online import OnlineKnn
from ijepa_scale.metrics.progress import Progress
from ijepa_scale.metrics.row import training_row
from ijepa_scale.metrics.sinks import JSONL_NAME, Sinks, open_sinks
from ijepa_scale.planning.flops import train_flops
from ijepa_scale.train.picture import draw_first_batch
from ijepa_scale.train.setup import Run, build_run, versions

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a pretraining run ended with."""

    steps: int
    loss: float | None  # of the last row
    knn: float | None
    knn_untrained: float | None
    checkpoint: Path


def pretrain(config: PretrainConfig, world: World) -> Result:
    """Returns the result of pretraining as `config` says, from the newest checkpoint if there is one.

    Every process calls it. Writes config.yaml, run.json, metrics.jsonl, masks.png, tensorboard/ and
    checkpoints/ into `config.folder`.

    Raises:
        UserError: anything that the user can mend; nothing that was saved is lost.
    """
    folder = Path(config.folder)
    resume = _find_checkpoint(config, world)
    run = build_run(config, world)
    return _Loop(run, folder, resume).train()


def _find_checkpoint(config: PretrainConfig, world: World) -> Path | None:
    """Returns the checkpoint to start from; rank 0 looks, so that all processes see the same."""
    found = world.broadcast_object(store.newest(Path(config.folder) / "checkpoints") if world.is_main else None)
    assert found is None or isinstance(found, Path)
    if config.resume not in ("auto", "none"):
        chosen = Path(config.resume)
        if found is not None and chosen.resolve().parent == found.resolve().parent and chosen.name < found.name:
            raise ConfigError(
                f"resume is {chosen} but {found} is newer and in the same folder; set another folder for the branch, "
                f"or remove the newer checkpoints"
            )
        return chosen
    if config.resume == "none" and found is not None:
        raise ConfigError(
            f"resume is none but {found} exists; set resume=auto to go on from it, or another folder to start anew"
        )
    return found


class _Loop:
    """The state of the loop beside the engine's: where it is, and what it writes."""

    def __init__(self, run: Run, folder: Path, resume: Path | None) -> None:
        self.run, self.folder = run, folder
        self.world, self.config = run.world, run.config
        self.start = 0
        self.resumed = resume
        self.knn: float | None = None
        self.knn_untrained: float | None = None
        self.loss: float | None = None
        self.versions = versions(self.world) if self.world.is_main else {}
        if resume is not None:
            self._resume(resume)
        evaluate = self.config.evaluate
        self.evaluator = None
        if evaluate.every:
            self.evaluator = OnlineKnn(
                evaluate,
                self.config.model.image_size,
                mean=self.config.augment.mean,
                std=self.config.augment.std,
                world=self.world,
            )

    def _resume(self, path: Path) -> None:
        checkpoint = store.Checkpoint(path)
        _check_identity(path, checkpoint.extra["identity"], self.run.identity())
        for line in _changes(checkpoint.extra["config"], json.loads(json.dumps(dataclasses.asdict(self.config)))):
            logger.warning("changed since %s: %s", path.name, line)
        checkpoint.load(self.run.engine.pieces())
        self.run.engine.loaded(checkpoint.step)
        self.start = checkpoint.step
        self.knn_untrained = checkpoint.extra["knn_untrained"]
        self.knn = checkpoint.extra["knn"]
        logger.info("resumed from %s: the next step is %d", path, self.start)
        if isinstance(self.run.source, StreamSource):
            logger.warning(
                "data.reader stream keeps no place: from step %d on other passes over the shards begin, so samples may "
                "come again before others have come (data.reader=shards goes on exactly)",
                self.start,
            )

    def train(self) -> Result:
        """Returns the result after the last step."""
        run, last = self.run, self.run.last_step
        if last == 0:
            raise ConfigError("the run has 0 steps; give a larger schedule.epochs or schedule.stop_after")
        if self.world.is_main:
            self._describe()
        with open_sinks(
            self.folder,
            rank=self.world.rank,
            tensorboard=self.config.logging.tensorboard,
            drop_from=self.start + 1 if self.start else 0,
        ) as sinks:
            mode = self.config.logging.progress if self.world.is_main else "none"
            progress = Progress(last, mode=mode, first_step=self.start)
            if self.evaluator is not None and self.start == 0:
                self._evaluate(0, sinks, progress)
            for batch in run.meters.timed(run.loader(self.start)):
                if batch.step == 0 and self.world.is_main:
                    with run.meters.paused():
                        draw_first_batch(run, batch, self.folder / "masks.png")
                self._step(batch)
                self._after(batch.step + 1, sinks, progress)
            progress.close()
        return Result(
            steps=max(last, self.start),
            loss=self.loss,
            knn=self.knn,
            knn_untrained=self.knn_untrained,
            checkpoint=self.resumed if self.resumed and self.start >= last else self._path(last),
        )

    def _step(self, batch: Batch) -> None:
        """Takes one step; where it can't be taken, saves the state before it, which has not moved."""
        try:
            self.run.step(batch)
        except NonFiniteError:  # raised on every process alike, so all of them can save
            if batch.step > self.start:
                # apart from the checkpoints: this state may be what diverges, and resuming must not choose it
                self._save(batch.step, folder="stopped", keep=1)
            raise

    def _path(self, done: int) -> Path:
        return self.folder / "checkpoints" / f"step-{done:08d}"

    def _after(self, done: int, sinks: Sinks, progress: Progress) -> None:
        """Does what is due after `done` steps."""
        last = self.run.last_step
        progress.advance()
        if done % self.config.logging.every == 0 or done == last:
            self._write_row(done, sinks, progress)
        with self.run.meters.paused():
            if self.evaluator is not None and (done % self.config.evaluate.every == 0 or done == last):
                self._evaluate(done, sinks, progress)
            every = self.config.checkpoint.every
            if (every and done % every == 0) or done == last:
                self._save(done)

    def _write_row(self, done: int, sinks: Sinks, progress: Progress) -> None:
        run = self.run
        means = run.meters.flush(run.world.mean)
        model, masks = self.config.model, self.config.masks
        flops = train_flops(
            model,
            context_tokens=round(means["context_tokens"]),
            target_tokens_per_block=round(means["target_tokens"]),
            num_targets=masks.num_target_blocks,
            num_context=masks.num_context_blocks,
        )
        row = training_row(
            means,
            step=done,
            epoch=run.order.epoch(done - 1),
            images_seen=done * run.batch_size,
            hyper=run.schedule(done - 1),
            images_per_step=run.batch_size,
            flops_per_image=flops.total,
            peak_flops=run.peak_flops(),
        )
        if run.world.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(run.world.device)
        self.loss = means["loss"]
        sinks.write(row)
        progress.show(row)

    def _evaluate(self, done: int, sinks: Sinks, progress: Progress) -> None:
        assert self.evaluator is not None
        self.knn = self.evaluator.run(self.run.engine.target)
        if done == 0:
            self.knn_untrained = self.knn
        sinks.write({"step": done, "knn": self.knn, "knn_untrained": self.knn_untrained})
        beside = "" if self.knn_untrained is None else f"  untrained {100 * self.knn_untrained:.1f}%"
        progress.note(f"step {done}  kNN of the target encoder {100 * self.knn:.1f}%{beside}")

    def _save(self, done: int, folder: str = "checkpoints", keep: int | None = None) -> None:
        extra = {
            "identity": self.run.identity(),
            "config": dataclasses.asdict(self.config),
            "versions": self.versions,
            "knn": self.knn,
            "knn_untrained": self.knn_untrained,
        }
        path = store.save(
            self.folder / folder,
            done,
            self.run.engine.pieces(),
            world=self.world,
            extra=extra,
            keep=keep or self.config.checkpoint.keep,
        )
        if self.world.is_main:
            logger.info("saved %s", path)

    def _describe(self) -> None:
        """Writes the run folder's config.yaml and run.json; rows of a run that left no checkpoint are put aside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = self.folder / JSONL_NAME
        if self.start == 0 and rows.exists():
            aside = next(name for n in count(1) if not (name := self.folder / f"metrics-{n}.jsonl").exists())
            rows.rename(aside)
            logger.warning("%s is of a run without checkpoint; moved to %s", rows, aside.name)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        (self.folder / "run.json").write_text(json.dumps(self.versions, indent=2) + "\n")
        logger.info(
            "%s: %s, batch %d, %d steps of which %d are done; %s in %s on %d x %s",
            self.folder, self.run.source.summary(), self.run.batch_size,
            self.run.last_step, self.start, self.config.engine.strategy, self.config.engine.precision,
            self.world.size, self.world.device.type,
        )  # fmt: skip


def _check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    lines = list(_changes(found, wanted))
    if lines:
        raise CheckpointError(
            f"{path} is of another run, so its numbers would not continue: {'; '.join(lines)}; "
            "give the same values, or another folder to start anew"
        )


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns a line for each value that differs, with its dotted name."""
    lines = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} was {old}, is {new}")
    return lines

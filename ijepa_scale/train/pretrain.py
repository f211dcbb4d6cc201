"""Pretraining as a task of the loop: its rows and its check by nearest neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.engine.protocol import StepInfo
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.online import OnlineKnn
from ijepa_scale.metrics.row import Row, training_row
from ijepa_scale.planning.flops import train_flops
from ijepa_scale.train.loop import Evaluation, Loop, find_checkpoint
from ijepa_scale.train.picture import draw_first_batch
from ijepa_scale.train.setup import Run, build_run


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

    Every process calls it. Writes what `Loop` writes, and masks.png, into `config.folder`.

    Raises:
        UserError: anything that the user can mend; nothing that was saved is lost.
    """
    resume = find_checkpoint(config, world)
    task = PretrainTask(build_run(config, world))
    loop = Loop(task, resume)
    task.prepare_evaluation()
    loop.train()
    return Result(
        steps=loop.steps, loss=loop.loss, knn=task.knn, knn_untrained=task.knn_untrained, checkpoint=loop.checkpoint
    )


class PretrainTask:
    """A pretraining run, with the online kNN where the configuration asks for it."""

    kind = "pretrain"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config, self.world, self.engine, self.meters = run.config, run.world, run.engine, run.meters
        self.source, self.batch_size = run.source, run.batch_size
        self.knn: float | None = None
        self.knn_untrained: float | None = None
        self._evaluator: OnlineKnn | None = None
        self._checked = self.config.engine.target_precision != "fp8"

    def prepare_evaluation(self) -> None:
        """Reads the labels of the evaluation's images; after resuming, which may be refused sooner."""
        config = self.config
        if config.evaluate.every:
            self._evaluator = OnlineKnn(
                config.evaluate,
                config.model.image_size,
                mean=config.augment.mean,
                std=config.augment.std,
                world=self.world,
            )

    @property
    def last_step(self) -> int:
        """The number of steps after which the run stops."""
        return self.run.last_step

    def loader(self, first_step: int) -> TrainLoader:
        """Returns this process's batches from `first_step` on."""
        return self.run.loader(first_step)

    def step(self, batch: Batch) -> StepInfo:
        """Takes one optimiser step, or raises before anything has moved."""
        if not self._checked:
            self._checked = True
            with self.meters.paused():
                micro = next(batch.split(self.config.engine.accumulation)).to(self.world.device)
                self.engine.check_fp8(self.run.augment(micro))
        return self.run.step(batch)

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must agree in to be continued."""
        return self.run.identity()

    def state(self) -> dict[str, Any]:
        """Returns the kNN figures."""
        return {"knn": self.knn, "knn_untrained": self.knn_untrained}

    def load_state(self, extra: dict[str, Any]) -> None:
        """Takes back the kNN figures."""
        self.knn, self.knn_untrained = extra["knn"], extra["knn_untrained"]

    def first_batch(self, batch: Batch, folder: Path) -> None:
        """Draws masks.png."""
        if self.world.is_main:
            draw_first_batch(self.run, batch, folder / "masks.png")

    def row(self, means: dict[str, float], done: int) -> Row:
        """Returns the row after `done` steps."""
        run, masks = self.run, self.config.masks
        flops = train_flops(
            self.config.model,
            context_tokens=round(means["context_tokens"]),
            target_tokens_per_block=round(means["target_tokens"]),
            num_targets=masks.num_target_blocks,
            num_context=masks.num_context_blocks,
        )
        return training_row(
            means,
            step=done,
            epoch=run.order.epoch(done - 1),
            images_seen=done * run.batch_size,
            hyper=run.schedule(done - 1),
            images_per_step=run.batch_size,
            flops_per_image=flops.total,
            peak_flops=run.peak_flops(),
        )

    def evaluates(self, done: int) -> bool:
        """Returns whether the kNN is due: before the first step, every `evaluate.every`, after the last."""
        due = done % max(1, self.config.evaluate.every) == 0 or done == self.last_step
        return self._evaluator is not None and due

    def evaluate(self, done: int) -> Evaluation:
        """Returns the kNN accuracy of the target encoder."""
        assert self._evaluator is not None
        self.knn = self._evaluator.run(self.engine.target)
        if done == 0:
            self.knn_untrained = self.knn
        beside = "" if self.knn_untrained is None else f"  untrained {100 * self.knn_untrained:.1f}%"
        return Evaluation(row=self.state(), note=f"kNN of the target encoder {100 * self.knn:.1f}%{beside}")

    def finish(self, folder: Path) -> None:
        """Does nothing: the last checkpoint is what pretraining is for."""

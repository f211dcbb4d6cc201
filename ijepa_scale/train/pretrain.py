"""Pretraining as a task of the loop: its parts, its rows and its evaluation."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from ijepa_scale.augment import Augment
from ijepa_scale.checkpoint.sources import WeightsSource, open_source
from ijepa_scale.checkpoint.start import fill_states, optimizer_states, start_from
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.sources.open import training_order
from ijepa_scale.engine.attention import require_packed
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.protocol import StepInfo
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.evaluator import Evaluator, build_evaluator
from ijepa_scale.masks import MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.planning.flops import train_flops
from ijepa_scale.schedules import Schedule
from ijepa_scale.train.health import RunHealth, block_figures, describe
from ijepa_scale.train.loop import run_task
from ijepa_scale.train.picture import draw_first_batch
from ijepa_scale.train.setup import check_size, global_batch, normalised, open_training_source, pixels_of
from ijepa_scale.train.step import TrainStep
from ijepa_scale.train.task import Evaluation, Result, Task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainResult(Result):
    """The result of a pretraining run: the evaluator's figures by name. `untrained` holds those before the first step.

    With `model.init` these are not of an untrained encoder, but of the one that the run started from: `is_adapted`.
    """

    evaluated: dict[str, float]
    untrained: dict[str, float]
    is_adapted: bool = False
    finetuning: str = ""  # settings by which labelled images of the same kind are finetuned on

    @property
    def knn(self) -> float | None:
        """The accuracy of the kNN evaluator, 0 to 1; None if it didn't run."""
        return self.evaluated.get("knn")

    @override
    def figures(self) -> str:
        called = "start" if self.is_adapted else "untrained"
        return "".join(f", {_with_first(name, self.evaluated, self.untrained, called)}" for name in self.evaluated)

    @override
    def next_commands(self) -> list[str]:
        return [
            *super().next_commands(),
            f"python launch/embed.py IMAGES --model {self.run} --to features.npy",
            f"python launch/finetune.py --config configs/finetune/base.yaml model.init={self.run} model.num_classes=N "
            f"data.train=TRAIN evaluate.test=VAL data.batch_size=64{self.finetuning}",
            f"python launch/export.py {self.run} --to encoder.safetensors",
        ]


def pretrain(config: PretrainConfig, world: World) -> PretrainResult:
    """Pretrains as `config` says, starting from the newest checkpoint if there is one, and returns the result.

    Every process must call it. Writes the files of `Loop` and masks.png into `config.folder`.

    Raises:
        UserError: a problem that the user can fix. Saved data is never lost.
    """
    result = run_task(PretrainTask, config, world)
    assert isinstance(result, PretrainResult)
    return result


class PretrainTask(Task):
    """A pretraining run in this process, with an online evaluator if the configuration enables one."""

    kind = "pretrain"
    config_kind = PretrainConfig
    identity_sections = ("seed", "model", "masks", "augment", "objective")

    def __init__(self, config: PretrainConfig, world: World, *, starting: bool = True) -> None:
        """Builds the parts and prepares the engine. Communicates if the engine does."""
        self.config, self.world = config, world
        self.batch_size = global_batch(config, world.size)
        self.masks = MaskSampler(
            config.masks, config.model.grid, seed=config.seed
        )  # first, since it may refuse the configuration
        self.source = open_training_source(config, log=world.is_main)
        self.config = config = normalised(config, self.source)
        check_size(config, self.source, self.batch_size, world.size)
        self.order = training_order(
            config.data,
            self.source,
            self.batch_size,
            seed=config.seed,
            steps_per_epoch=config.schedule.steps_per_epoch,
        )
        self.schedule: Schedule = build_schedule(config, self.order.steps_per_epoch)
        stop, total = config.schedule.stop_after, self.schedule.total_steps
        self.last_step = total if stop is None else min(stop, total)
        self.objective = build_objective(config.objective, triton=config.engine.triton)
        self.augment = Augment(
            config.augment, config.model.image_size, seed=config.seed, pixels=pixels_of(config), device=world.device
        )
        module = build_jepa(config.model, config.seed)
        target = build_target(module)
        start = self._start(module, target) if config.model.init is not None and starting else None
        self.engine = build_engine(world, config.engine, config.optimizer)
        self.engine.prepare(module, target)
        if start is not None and config.model.init_state == "training":
            self._go_on(start)
        if config.masks.context == "packed":
            require_packed(config.engine, module, world)
        self.meters = Meters(world.device)
        self._take_step = TrainStep(
            self.engine,
            augment=self.augment,
            masks=self.masks,
            schedule=self.schedule,
            objective=self.objective,
            batch_size=self.batch_size,
            meters=self.meters,
        )
        self.evaluated: dict[str, float] = {}
        self.untrained: dict[str, float] = {}
        self._evaluator: Evaluator | None = None
        self._health = RunHealth(config, self.first_step, self.last_step)
        self._block_norms: Mapping[str, Tensor | float] | None = None  # of the last step that measured them
        self._checked = config.engine.target_precision != "fp8"

    def _start(self, module: JEPA, target: VisionTransformer) -> WeightsSource:
        """Loads the weights of `model.init`, and reports them."""
        assert self.config.model.init is not None
        source = open_source(self.config.model.init)
        report = start_from(source, module, target)
        if self.world.is_main:
            doubts = report.predictor is None or report.notes
            logger.log(logging.WARNING if doubts else logging.INFO, "%s", report.text())
            state = self.config.model.init_state
            self.origin = {"source": self.config.model.init, "sha256": source.digest(), "state": state}
        return source

    def _go_on(self, source: WeightsSource) -> None:
        """Loads the optimiser's state, and sets the step that the run goes on with."""
        states = optimizer_states(source, self.config.model, self.schedule.steps_per_epoch)
        fill_states(self.engine.pieces(), states, source.origin)
        self.engine.loaded(states.optimizer_step)
        self.first_step = states.step
        self.steps_before = states.optimizer_step - states.step
        for note in states.notes:
            logger.warning("%s", note)
        logger.info("the optimiser goes on from %s: the next step is %d", source.origin, self.first_step)

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must agree in: its optimiser's states mean nothing to another optimiser."""
        return {**super().identity(), "optimizer.name": self.config.optimizer.name}

    def step(self, batch: Batch) -> StepInfo:
        """Takes one optimiser step, or raises before anything has changed. Before the first, checks an fp8 target."""
        if not self._checked:
            self._checked = True
            with self.meters.paused():
                micro = next(batch.split(self.config.engine.accumulation)).to(self.world.device)
                self.engine.check_fp8(self.augment(micro))
        self._take_step.by_block = self._health.is_due(batch.step + 1)
        info = self._take_step(batch)
        self._block_norms = info.block_norms
        return info

    def measured_step(self, batch: Batch) -> StepInfo:
        """Takes one optimiser step, and measures the norm of the gradient in each block."""
        self._take_step.by_block = True
        return self._take_step(batch)

    @override
    def forget_best(self) -> None:
        self._health.forget_best()

    @override
    def prepare_evaluation(self) -> None:
        """Builds the evaluator, which reads the labels of its images, and reads the images of `health`."""
        if self.config.evaluate.every:
            self._evaluator = build_evaluator(self.config, self.world)
        micro_batch = self.batch_size // (self.world.size * self.config.engine.accumulation)
        self._health.open(self.source, self.objective, self.world, micro_batch)

    @override
    def state(self) -> dict[str, Any]:
        return {
            "evaluated": self.evaluated,
            "untrained": self.untrained,
            "health": self._health.state(),
            "block_norms": {name: float(norm) for name, norm in (self._block_norms or {}).items()},
        }

    @override
    def load_state(self, extra: dict[str, Any]) -> None:
        if "health" in extra:
            self._health.load_state(extra["health"])
            # of the last step, for a measurement that is still due; null was no finite number
            norms = extra["block_norms"].items()
            self._block_norms = {name: math.nan if norm is None else norm for name, norm in norms}
        if "evaluated" in extra:
            self.evaluated, self.untrained = dict(extra["evaluated"]), dict(extra["untrained"])
            return
        for kept, name in ((self.evaluated, "knn"), (self.untrained, "knn_untrained")):  # checkpoints of version 0.1.0
            if extra.get(name) is not None:
                kept["knn"] = extra[name]

    @override
    def first_batch(self, batch: Batch, folder: Path) -> tuple[str, ...]:
        """Draws masks.png."""
        if self.world.is_main:
            draw_first_batch(self, batch, folder / "masks.png")
        return ("masks",)

    @override
    def flops_per_image(self, means: dict[str, float]) -> float:
        """Returns the FLOPs of one training image with the masks' mean number of tokens."""
        masks = self.config.masks
        return train_flops(
            self.config.model,
            context_tokens=round(means["context_tokens"]),
            target_tokens_per_block=round(means["target_tokens"]),
            num_targets=masks.num_target_blocks,
            num_context=masks.num_context_blocks,
        ).total

    @override
    def evaluates(self, done: int) -> bool:
        """Returns whether evaluator or health are due: before the first step, at their intervals, after the last."""
        return self._is_due(done) or self._health.is_due(done)

    def _is_due(self, done: int) -> bool:
        due = done % max(1, self.config.evaluate.every) == 0 or done in (self.first_step, self.last_step)
        return self._evaluator is not None and due

    @override
    def evaluate(self, done: int) -> Evaluation:
        """Returns the figures of evaluator and health, as far as they are due. Every process must call it."""
        row: dict[str, float] = {}
        notes, alarm = [], None
        if self._is_due(done):
            row |= self._evaluate(done)
            before = "untrained" if self.config.model.init is None else "start"
            note = ", ".join(_with_first(name, self.evaluated, self.untrained, before) for name in self.evaluated)
            notes.append(f"target encoder: {note}")
        if self._health.is_due(done):
            figures = self._health.measure(self.engine)
            row |= {**figures, **block_figures(self._block_norms or {})}
            notes.append(describe(figures))
            alarm = self._health.alarm.judge(figures, done)
            row["alarm"] = int(self._health.alarm.is_on)
        best = self._health.is_best(row, done)
        if alarm is not None:
            logger.warning("%s", alarm)
        stops = alarm if self.config.health.on_collapse == "stop" else None
        return Evaluation(row=row, note="; ".join(notes), is_best=best, stops=stops)

    def _evaluate(self, done: int) -> dict[str, float]:
        """Returns the evaluator's figures for the target encoder, with those before the first step."""
        assert self._evaluator is not None
        self.evaluated = self._evaluator.run(self.engine.target)
        if done == self.first_step:
            self.untrained = self.evaluated
        before = "untrained" if self.config.model.init is None else "start"
        return {**self.evaluated, **{f"{name}_{before}": value for name, value in self.untrained.items()}}

    @override
    def result(self, *, steps: int, loss: float | None, checkpoint: Path) -> PretrainResult:
        return PretrainResult(
            steps=steps,
            loss=loss,
            checkpoint=checkpoint,
            evaluated=self.evaluated,
            finetuning=_finetuning(self.config),
            untrained=self.untrained,
            is_adapted=self.config.model.init is not None,
        )


def build_schedule(config: PretrainConfig, steps_per_epoch: int) -> Schedule:
    """Returns the schedules of the run. `schedule.steps_per_epoch`, if set, replaces the data's number."""
    return Schedule(
        steps_per_epoch=config.schedule.steps_per_epoch or steps_per_epoch,
        epochs=config.schedule.epochs,
        warmup_epochs=config.schedule.warmup_epochs,
        ipe_scale=config.schedule.ipe_scale,
        start_lr=config.optimizer.start_lr,
        lr=config.optimizer.lr,
        final_lr=config.optimizer.final_lr,
        weight_decay=config.optimizer.weight_decay,
        final_weight_decay=config.optimizer.final_weight_decay,
        momentum=config.schedule.momentum,
    )


def _finetuning(config: PretrainConfig) -> str:
    """Returns the settings that finetuning on images of the same kind needs, each after a space."""
    reader = config.data.reader
    return (f" data.reader={reader} evaluate.reader={reader}" if reader in ("imagefolder", "list") else "") + (
        "" if PixelFormat(config.model.channels, config.data.pixels).is_rgb8 else " augment.rand_augment=null"
    )


def _with_first(name: str, found: dict[str, float], first: dict[str, float], called: str) -> str:
    """Returns a figure with the one before the first step; says so if it fell below that of the weights in use."""
    if name not in first:
        return f"{name} {found[name]:.4g}"
    worse = ": worse than where it began" if called == "start" and found[name] < first[name] else ""
    return f"{name} {found[name]:.4g} ({called} {first[name]:.4g}{worse})"

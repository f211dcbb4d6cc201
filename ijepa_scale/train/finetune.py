"""Finetuning as a task of the loop: the MAE recipe, its evaluation and its results."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from ijepa_scale.augment.mae import FinetuneAugment
from ijepa_scale.augment.mixing import check_pairs
from ijepa_scale.augment.pipeline import to_device
from ijepa_scale.checkpoint.export import export_safetensors
from ijepa_scale.checkpoint.sources import open_source
from ijepa_scale.checkpoint.store import newest
from ijepa_scale.checkpoint.weights import LoadReport, fit
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.data.sources.scan import Members
from ijepa_scale.data.sources.source import check_whole
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.class_lists import compare_classes
from ijepa_scale.evaluate.classification import Accuracy, ClassifierCheck, check_labels
from ijepa_scale.evaluate.classifier_report import class_names, write_report
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.metrics.row import Row
from ijepa_scale.models.classifier import Classifier, build_classifier, drop_factors
from ijepa_scale.objectives.cross_entropy import soft_cross_entropy
from ijepa_scale.optim.groups import layer_decay_groups
from ijepa_scale.planning.flops import finetune_flops
from ijepa_scale.schedules import FinetuneSchedule
from ijepa_scale.train.finetune_step import FinetuneStep
from ijepa_scale.train.loop import run_task
from ijepa_scale.train.preflight import Preflight
from ijepa_scale.train.setup import check_size, global_batch, normalised, open_training_source, pixels_of
from ijepa_scale.train.task import Evaluation, Result, Task

EXPORT = "model.safetensors"
_PRETRAINING = (
    "momentum",
    "target_std",
    "context_tokens",
    "target_tokens",
)  # columns that only rows of pretraining have


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult(Result):
    """The result of a finetuning run. Accuracies are between 0 and 1, or None without `evaluate.test`."""

    top1: float | None
    top5: float | None
    best_top1: float | None

    @override
    def figures(self) -> str:
        top = "" if self.top1 is None else f", top-1 {self.top1:.2%}, top-5 {self.top5 or 0:.2%}"
        return top + ("" if self.best_top1 is None else f" (best top-1 {self.best_top1:.2%})")

    @override
    def next_commands(self) -> list[str]:
        return [
            *super().next_commands(),
            f"python launch/predict.py IMAGES --model {self.run}",
            f"python launch/export.py {self.run} --to classifier.pt2",
        ]


def finetune(config: FinetuneConfig, world: World) -> FinetuneResult:
    """Finetunes as `config` says, starting from the newest checkpoint if there is one, and returns the result.

    Every process must call it. Writes the files of `Loop`, first_batch.png, preflight.txt and the results into
    `config.folder`.

    Raises:
        UserError: a problem that the user can fix. Saved data is never lost.
    """
    result = run_task(FinetuneTask, config, world)
    assert isinstance(result, FinetuneResult)
    return result


class FinetuneTask(Task):
    """A finetuning run in this process. Reads initial weights only if the run is `starting`, not if it resumes."""

    kind = "finetune"
    config_kind = FinetuneConfig
    identity_sections = ("seed", "model", "augment", "optimizer", "schedule")

    def __init__(self, config: FinetuneConfig, world: World, *, starting: bool) -> None:
        """Builds the parts and prepares the engine. Communicates if the engine does."""
        self.config, self.world = config, world
        data, model = config.data, config.model
        self.batch_size = global_batch(config, world.size)
        check_pairs(self.batch_size, world.size * config.engine.accumulation, config.augment)
        self.source = source = open_training_source(config, log=world.is_main)
        assert not isinstance(source, StreamSource), "FinetuneConfig refuses streams"
        self.config = config = normalised(config, source)
        check_size(config, source, self.batch_size, world.size)
        labels = check_labels(source, model.num_classes, "data.train")
        self.order = SampleOrder(source.shard_sizes, self.batch_size, config.seed, data.window_shards)
        self.schedule: FinetuneSchedule = build_finetune_schedule(config, self.batch_size, self.order.steps_per_epoch)
        stop, total = config.schedule.stop_after, self.schedule.total_steps
        self.last_step = total if stop is None else min(stop, total)
        self._labels = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
        self.classes = class_names(source, model.num_classes)
        self._check = self._build_check()
        self.augment = FinetuneAugment(
            config.augment,
            model.encoder.image_size,
            num_classes=model.num_classes,
            seed=config.seed,
            pixels=pixels_of(config),
            device=world.device,
        )
        module = build_classifier(model, seed=config.seed)
        self.loaded: LoadReport | None = None
        if model.init is not None and starting:
            self.loaded = self._start(module, model.init)
        groups = partial(layer_decay_groups, layer_decay=config.optimizer.layer_decay)
        self.preflight = Preflight(config, self.batch_size, self.schedule, module, groups(module), labels)
        self._drop_rates = module.drop_rates
        self.engine = build_engine(world, config.engine, config.optimizer.adamw(self.batch_size))
        average = copy.deepcopy(module) if config.optimizer.ema is not None else None
        self.engine.prepare(module, average, groups=groups, followed="")
        self.meters = Meters(world.device)
        self.step = FinetuneStep(
            self.engine,
            augment=self.augment,
            drop_path=self._drop,
            schedule=self.schedule,
            momentum=config.optimizer.ema,
            meters=self.meters,
        )
        self.accuracy: Accuracy | None = None
        self.top1: float | None = None
        self.top5: float | None = None
        self.best_top1: float | None = None
        self._before: float | None = None  # the best before that
        self._evaluated_step = 0

    @override
    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must agree in: also the labels, which a class list may number differently."""
        found = super().identity()
        del found["schedule"]["stop_after"]  # a run may go on after the step that it was stopped at
        return {**found, "labels": self._labels}

    def _start(self, module: Classifier, init: str) -> LoadReport:
        """Loads the weights of `model.init`; what was loaded stands in preflight.txt and so in the log."""
        source, model = open_source(init), self.config.model
        report = fit(module, source.encoder(model.weights), keep_head=model.keep_head, classes=self.classes)
        if self.world.is_main:
            self.origin = {"source": init, "sha256": source.digest()}
        return report

    def _build_check(self) -> ClassifierCheck | None:
        config, model = self.config.evaluate, self.config.model
        if config.test is None:
            return None
        data, (mean, std) = self.config.data, self.config.augment.normalisation
        members = Members(data.image_member, data.label_member)
        source = build_source(config.reader, config.test, members=members, verify=data.verify)
        check_whole(source)
        assert not isinstance(self.source, StreamSource)
        compare_classes(("data.train", self.source), ("evaluate.test", source), log=self.world.is_main)
        return ClassifierCheck(
            source,
            model.encoder.image_size,
            model.num_classes,
            world=self.world,
            batch_size=config.batch_size,
            crop_fraction=config.crop_of(model.encoder.image_size),
            mean=mean,
            std=std,
            exif=data.exif,
            pixels=pixels_of(self.config),
            workers=config.workers,
        )

    @override
    def prepare_evaluation(self) -> None:
        if self._check is not None:
            self._check.try_images()

    def _drop(self, micro: Batch) -> Tensor | None:
        """Returns the drop path factors of these images, keyed by their positions in the global batch."""
        if not any(self._drop_rates):
            return None
        positions = micro.position + np.arange(len(micro))
        factors = drop_factors(self._drop_rates, seed=self.config.seed, step=micro.step, samples=positions)
        return to_device(factors, self.world.device)

    @override
    def state(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "best_top1": self.best_top1, "classes": self.classes}

    @override
    def load_state(self, extra: dict[str, Any]) -> None:
        self.top1, self.top5, self.best_top1 = extra["top1"], extra["top5"], extra["best_top1"]

    @override
    def forget_best(self) -> None:
        self.best_top1 = self._before

    @override
    def first_batch(self, batch: Batch, folder: Path) -> tuple[str, ...]:
        """Writes preflight.txt and first_batch.png. Communicates: every process runs a forward pass."""
        micro = next(batch.split(self.config.engine.accumulation))
        images, targets = self.augment(micro)
        loss = self.world.mean(soft_cross_entropy(self.engine.evaluate(images), targets).detach())
        if self.world.is_main:
            self.preflight.write(folder, self.world, self.loaded, float(loss))
            self.preflight.draw(folder, images, targets, self.classes)
        return ("first_batch",)

    @override
    def row(self, means: dict[str, float], done: int) -> Row:
        """Returns the row after `done` steps, without the columns of pretraining."""
        return {name: value for name, value in super().row(means, done).items() if name not in _PRETRAINING}

    @override
    def flops_per_image(self, means: dict[str, float]) -> float:
        return finetune_flops(self.config.model.pretrained, frozen_blocks=self.config.model.frozen_blocks)

    @override
    def evaluates(self, done: int) -> bool:
        """Returns whether an evaluation is due: every `evaluate.every_epochs` and after the last step."""
        if self._check is None or done == 0:
            return False
        every = max(1, round(self.config.evaluate.every_epochs * self.order.steps_per_epoch))
        return done % every == 0 or done == self.last_step

    @override
    def evaluate(self, done: int) -> Evaluation:
        """Returns top-1 and top-5 over all evaluation images, with the averaged weights if there are any."""
        assert self._check is not None
        averaged = self.config.optimizer.ema is not None
        found = self.accuracy = self._check.run(self.engine.target if averaged else self.engine.evaluate)
        best = self.best_top1 is None or found.top1 > self.best_top1
        self._before = self.best_top1
        self.top1, self.top5, self._evaluated_step = found.top1, found.top5, done
        self.best_top1 = found.top1 if self.best_top1 is None else max(self.best_top1, found.top1)
        row = {"top1": found.top1, "top5": found.top5, "eval_loss": found.loss, "best_top1": self.best_top1}
        note = f"top-1 {found.top1:.2%}  top-5 {found.top5:.2%}  best top-1 {self.best_top1:.2%}"
        return Evaluation(row=row, note=note, is_best=best)

    @override
    def finish(self, folder: Path) -> None:
        """Writes the results: accuracies, per-class table, confusion matrix, curves and the best weights."""
        if self.world.is_main:
            best = newest(folder / "best")
            export_safetensors(best or folder, folder / EXPORT)
            if self.accuracy is not None:
                write_report(folder, self.accuracy, self._evaluated_step, self.config.model.num_classes, self.classes)

    @override
    def result(self, *, steps: int, loss: float | None, checkpoint: Path) -> FinetuneResult:
        last = self.accuracy
        return FinetuneResult(
            steps=steps,
            loss=loss,
            checkpoint=checkpoint,
            top1=last.top1 if last else self.top1,
            top5=last.top5 if last else self.top5,
            best_top1=self.best_top1,
        )


def build_finetune_schedule(config: FinetuneConfig, batch_size: int, steps_per_epoch: int) -> FinetuneSchedule:
    """Returns the schedules of the run. `batch_size` is the global batch size: images per optimiser step."""
    optimizer = config.optimizer
    return FinetuneSchedule(
        steps_per_epoch=steps_per_epoch,
        epochs=config.schedule.epochs,
        warmup_epochs=config.schedule.warmup_epochs,
        lr=optimizer.peak_lr(batch_size),
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
    )

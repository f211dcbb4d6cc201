"""Defines tasks, which the loop runs. Must not know any kind of training.

A kind of training is a subclass of `Task`, and its step has its own file. All kinds share what is here, in `loop` and
in `command`: loader, last step, identity, and everything from the command line to the result.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import PixelRules
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.engine.protocol import Engine, StepInfo
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.metrics.row import Row, training_row
from ijepa_scale.planning.hardware import peak_flops
from ijepa_scale.plurals import counted
from ijepa_scale.schedules import Hyper
from ijepa_scale.train.initial import STARTING
from ijepa_scale.train.setup import encoder_of, pixels_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation."""

    row: dict[str, Any]  # figures for metrics.jsonl
    note: str  # one line for a person
    is_best: bool = False  # best result of the run so far, so this state is saved
    stops: str | None = None  # why the run must end here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run."""

    steps: int
    loss: float | None  # of the last row; None if no steps were left
    checkpoint: Path

    def figures(self) -> str:
        """Returns the figures of the evaluations as text, empty without evaluations."""
        return ""

    def text(self) -> str:
        """Returns one line for a person."""
        loss = "no steps were left" if self.loss is None else f"loss {self.loss:.4f}"
        return f"done: {counted(self.steps, 'step')}, {loss}{self.figures()}; {self.checkpoint}"

    @property
    def run(self) -> str:
        """The run's folder, as a word of a command."""
        return shlex.quote(str(self.checkpoint.parents[1]))

    def next_commands(self) -> list[str]:
        """Returns the commands that a user may want next."""
        return [f"python launch/report.py {self.run} --to report.html"]


class Task:
    """One process's part of a run. Subclasses build their parts in `__init__`, and `step` takes their steps."""

    kind: ClassVar[str]  # pretrain or finetune: a checkpoint continues only runs of its kind
    config_kind: ClassVar[type[Any]]  # the class of `config`
    identity_sections: ClassVar[tuple[str, ...]]  # a checkpoint continues only runs with equal values in these

    config: Any
    world: World
    engine: Engine
    meters: Meters
    spikes: SpikeJudge  # what the loop's engine judges by
    source: SampleSource | StreamSource
    order: SampleOrder | StreamOrder
    schedule: Callable[[int], Hyper]
    step: Callable[..., StepInfo]  # (batch): takes one optimiser step, or raises before anything has changed
    batch_size: int  # images per optimiser step, over all processes
    first_step: int = 0  # of a new run; another one if it goes on from an optimiser's state
    steps_before: int = 0  # that the optimiser had taken before step 0, less the steps that the schedules left out
    last_step: int  # the run stops after this number of steps
    origin: dict[str, Any] | None = None  # what the run's first weights came from; None: they were drawn

    def __init__(self, config: Any, world: World, *, starting: bool) -> None:
        raise NotImplementedError

    def loader(self, first_step: int) -> TrainLoader:
        """Returns this process's batches from `first_step` on."""
        data = self.config.data
        return TrainLoader(
            self.source,
            self.order,
            self.config.augment,  # for the crops; the rest is done on the device
            encoder_of(self.config).image_size,
            seed=self.config.seed,
            rules=PixelRules(data.exif, data.decode_scaling, pixels_of(self.config)),
            rank=self.world.rank,
            world=self.world.size,
            workers=data.workers,
            prefetch=data.prefetch,
            start_step=first_step,
            stop_step=self.last_step,
            max_bad_fraction=data.max_bad_fraction,
            device=self.world.device,
        )

    def identity(self) -> dict[str, Any]:
        """Returns the values, as JSON types, that must equal a checkpoint's so that this run can continue it."""
        config = self.config.values()
        for name in STARTING:
            config["model"].pop(name, None)  # a run that goes on doesn't start anew
        return {
            **{section: config[section] for section in self.identity_sections},
            "batch size of all processes": self.batch_size,
            "data": self.source.fingerprint,
            "data.window_shards": self.config.data.window_shards,
            "data.exif": self.config.data.exif,
            "data.decode_scaling": self.config.data.decode_scaling,
            "data.pixels": self.config.data.pixels,
        }

    def row(self, means: dict[str, float], done: int) -> Row:
        """Returns the row of `metrics.jsonl` after `done` steps. `means` are the flushed values of the meters."""
        return training_row(
            means,
            step=done,
            epoch=self.order.epoch(done - 1),
            images_seen=done * self.batch_size,
            hyper=self.schedule(done - 1),
            images_per_step=self.batch_size,
            flops_per_image=self.flops_per_image(means),
            peak_flops=self.peak_flops(),
        )

    def peak_flops(self) -> float | None:
        """Returns the peak FLOP/s of all devices together, or None if it is unknown."""
        if self.world.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.world.device))
        return None if peak is None else peak * self.world.size

    def flops_per_image(self, means: dict[str, float]) -> float:
        """Returns the FLOPs of one training image, forward and backward."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns the values that a checkpoint stores with the engine's state."""
        raise NotImplementedError

    def load_state(self, extra: dict[str, Any]) -> None:
        """Restores the values that `state` returned."""
        raise NotImplementedError

    def prepare_evaluation(self) -> None:
        """Opens or tries the data of evaluations. Called after a checkpoint, if any, was loaded. May communicate."""

    def first_batch(self, batch: Batch, folder: Path) -> tuple[str, ...]:
        """Draws or checks the first batch before it is used, and returns the PNGs' names. Its time isn't counted."""
        return ()

    def evaluates(self, done: int) -> bool:
        """Returns whether an evaluation is due after `done` steps; 0 is before the first step."""
        raise NotImplementedError

    def evaluate(self, done: int) -> Evaluation:
        """Returns the result of an evaluation. Communicates, so every process must call it."""
        raise NotImplementedError

    def forget_best(self) -> None:
        """Call if the state of the last `is_best` couldn't be saved: the best one is again the one before."""

    def finish(self, folder: Path) -> None:
        """Writes final results. Called after the last step was saved."""

    def result(self, *, steps: int, loss: float | None, checkpoint: Path) -> Result:
        """Returns the result of the run."""
        return Result(steps=steps, loss=loss, checkpoint=checkpoint)

"""What a training run trains: the parts of one process, which the loop drives. Knows no kind of training.

A kind of training is a subclass of `Task` with its step in a file of its own; loader, last step, identity and
the way from the command line to the result are written once, here and in `loop` and `command`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.engine.protocol import Engine, StepInfo
from ijepa_scale.engine.world import World
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.metrics.row import Row, training_row
from ijepa_scale.planning.hardware import peak_flops
from ijepa_scale.schedules import Hyper
from ijepa_scale.train.setup import encoder_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found."""

    row: dict[str, Any]  # figures, for metrics.jsonl
    note: str  # one line for a person
    is_best: bool = False  # of the run so far: this state is kept apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ended with."""

    steps: int
    loss: float | None  # of the last row; None where no steps were left
    checkpoint: Path

    def figures(self) -> str:
        """Returns what evaluations found, in words; empty without any."""
        return ""

    def text(self) -> str:
        """Returns one line for a person."""
        loss = "no steps were left" if self.loss is None else f"loss {self.loss:.4f}"
        return f"done: {self.steps} steps, {loss}{self.figures()}; {self.checkpoint}"


class Task:
    """One process's part of a run. A subclass builds its parts in `__init__`, and takes its steps through `step`."""

    kind: ClassVar[str]  # pretrain | finetune: a checkpoint continues runs of its own kind
    config_kind: ClassVar[type[Any]]  # the class of `config`
    identity_sections: ClassVar[tuple[str, ...]]  # a checkpoint continues a run only where these are the same

    config: Any
    world: World
    engine: Engine
    meters: Meters
    source: SampleSource | StreamSource
    order: SampleOrder | StreamOrder
    schedule: Callable[[int], Hyper]
    step: Callable[..., StepInfo]  # (batch): takes one optimiser step, or raises before anything has moved
    batch_size: int  # images per optimiser step, over all processes
    last_step: int  # the number of steps after which the run stops

    def __init__(self, config: Any, world: World, *, starting: bool) -> None:
        raise NotImplementedError

    def loader(self, first_step: int) -> TrainLoader:
        """Returns this process's batches from `first_step` on."""
        data = self.config.data
        return TrainLoader(
            self.source,
            self.order,
            self.config.augment,  # its crops: the rest is done on the device
            encoder_of(self.config).image_size,
            seed=self.config.seed,
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
        """Returns what a checkpoint must agree in to be continued, as JSON gives it back."""
        config = self.config.values()
        return {
            **{section: config[section] for section in self.identity_sections},
            "batch size of all processes": self.batch_size,
            "data": self.source.fingerprint,
            "data.window_shards": self.config.data.window_shards,
        }

    def row(self, means: dict[str, float], done: int) -> Row:
        """Returns the row of `metrics.jsonl` after `done` steps; `means` is what the meters flushed."""
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
        """Returns the peak of all devices together, FLOP/s, or None where it isn't known."""
        if self.world.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.world.device))
        return None if peak is None else peak * self.world.size

    def flops_per_image(self, means: dict[str, float]) -> float:
        """Returns the FLOPs of one training image, forward and backward."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps with the engine's state."""
        raise NotImplementedError

    def load_state(self, extra: dict[str, Any]) -> None:
        """Takes back what `state` returned."""
        raise NotImplementedError

    def prepare_evaluation(self) -> None:
        """Opens what evaluations read; called once the run is known to start or to continue."""

    def first_batch(self, batch: Batch, folder: Path) -> None:
        """Looks at the batch of step 0 before it is used, with the clock stopped: pictures, checks."""

    def evaluates(self, done: int) -> bool:
        """Returns whether an evaluation is due after `done` steps (0: before the first)."""
        raise NotImplementedError

    def evaluate(self, done: int) -> Evaluation:
        """Returns what an evaluation finds. Communicates: every process calls it."""
        raise NotImplementedError

    def finish(self, folder: Path) -> None:
        """Writes what is left to write when the last step is done and saved."""

    def result(self, *, steps: int, loss: float | None, checkpoint: Path) -> Result:
        """Returns the result of the run."""
        return Result(steps=steps, loss=loss, checkpoint=checkpoint)

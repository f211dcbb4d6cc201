"""Rebuilds a step of a pretraining run: its images, masks, losses and gradients. Writes nothing that a run reads.

Order, crops and masks are functions of the seed and the step, so the configuration and a checkpoint are enough.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ijepa_scale import terminal
from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.folder import named, path_of, step_of
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.spikes import SpikesConfig
from ijepa_scale.config.yaml_text import parse_yaml
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.engine.spikes import SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import Wanted
from ijepa_scale.metrics.plots import draw_masks
from ijepa_scale.metrics.sinks import JSONL_NAME
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.plurals import counted
from ijepa_scale.train import processes
from ijepa_scale.train.picture import with_masks
from ijepa_scale.train.pretrain import PretrainTask
from ijepa_scale.train.resuming import check_continues
from ijepa_scale.train.setup import with_strategy
from ijepa_scale.train.spikes import load_state_of, roll_back

logger = logging.getLogger(__name__)

_SHOWN = 6  # samples of the highest loss, in the picture and in the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What to replay."""

    config: PretrainConfig  # of the run, whose folder it names
    step: int
    exact: bool  # take the steps from the checkpoint on again
    to: Path  # folder of the results
    processes: int  # that the run had


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample of the batch; its loss is of one forward pass of its own."""

    position: int  # in the global batch
    sample_id: int
    name: str
    label: int
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed:
    """A step taken again: `weights_step` steps were done before it, and the state came from `weights`."""

    step: int
    epoch: int
    weights: str
    weights_step: int
    loss: float
    grad_norm: float
    block_norms: dict[str, float]
    samples: list[Sample]  # of all processes, by position
    row: dict[str, float | None] | None  # loss and gradient norm of the run's own row of this one step, if it has one

    @property
    def worst(self) -> list[Sample]:
        """The samples with the highest losses, NaN first."""
        return sorted(self.samples, key=lambda sample: -_rank(sample.loss))[:_SHOWN]

    def lines(self) -> Iterator[str]:
        """Yields lines for a person."""
        yield f"step {self.step}, epoch {self.epoch}: {counted(len(self.samples), 'image')}"
        yield f"weights after {counted(self.weights_step, 'step')}, from {self.weights}"
        if self.weights_step != self.step:
            yield (
                f"  the run had taken {counted(self.step - self.weights_step, 'step')} more; "
                f"--exact takes them again, and gives "
                "the very weights of the step"
            )
        yield f"loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}{self._compared()}"
        for name, norm in sorted(self.block_norms.items(), key=lambda item: -_rank(item[1])):
            yield f"  {norm:12.6g}  {name}"
        yield f"highest losses of {len(self.samples)} images, each alone; the picture shows them from left to right:"
        for sample in self.worst:
            yield f"  {sample.loss:12.6g}  {sample.name}, position {sample.position}, label {sample.label}"

    def _compared(self) -> str:
        if self.row is None:
            return "; the run has no row of this step alone (logging.every=1 gives each step one)"
        if self.row["loss"] is None:
            return "; the run left this step out, so its row has no loss"
        if self.weights_step != self.step:
            return f"; the run's row: {self.row['loss']:.6g}, {self.row['grad_norm']:.6g}"
        if (self.loss, self.grad_norm) == (self.row["loss"], self.row["grad_norm"]):
            return "; equal to the run's row, bit for bit"
        return (
            f"; the run's row: {self.row['loss']:.9g}, {self.row['grad_norm']:.9g}, not the same bits: those need the "
            "run's number of processes, engine and device, and a checkpoint of the same course"
        )


def options_of(
    run: Path, step: int, *, exact: bool, to: str | None, started: int, overrides: Sequence[str]
) -> ReplayOptions:
    """Returns what to replay, with the run's configuration for the number of processes that are `started`.

    Raises:
        ConfigError: it is no folder of a pretraining run, or it ran on another number of processes, which isn't 1.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} has no config.yaml; give the folder of a run")
    model = parse_yaml(path.read_text(), str(path)).get("model")
    if isinstance(model, dict) and "encoder" in model:
        raise ConfigError(f"{run} is a finetuning run; only steps of pretraining runs can be replayed")
    fixed = [f"folder={run}", "schedule.stop_after=null", *([] if exact else ["engine.compile=false"])]
    config: PretrainConfig = load_config(path, [*fixed, *overrides])
    had = _processes_of(run)
    if started not in (1, had):
        raise ConfigError(
            f"{started} processes were started, but {run} had {had}; start {'1' if had == 1 else f'{had}, or 1'}"
        )
    if started == 1 and had > 1:
        data, engine = config.data, config.engine
        batch = data.batch_size or (data.batch_size_per_process or 0) * had
        accumulation = engine.accumulation * had
        config = config.replace(
            data=data.replace(batch_size=batch, batch_size_per_process=None),
            engine=engine.replace(
                strategy="plain", ds_config=None, replicas=1, zero_communication="fp32", accumulation=accumulation
            ),
        )
    folder = run / "replay" / path_of(run, step).name if to is None else Path(to)
    return ReplayOptions(config=config, step=step, exact=exact, to=folder, processes=had)


def _processes_of(run: Path) -> int:
    try:
        return int(json.loads((run / "run.json").read_text())["processes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run / 'run.json'} doesn't say how many processes the run had ({error})") from None


def replay_here(options: ReplayOptions, launch: Launch, device: torch.device) -> None:
    """Replays in this process, and prints the result if it is the main process."""
    terminal.log_to_terminal(logging.WARNING)
    config: PretrainConfig = with_strategy(options.config, launch, device)
    with processes.world_of(launch, device, alone=config.engine.strategy == "plain") as world:
        found = replay(dataclasses.replace(options, config=config), world)
        if world.is_main:
            terminal.say(*found.lines(), f"{options.to}/batch.png, step.json")
        world.barrier()  # the last collective


def replay(options: ReplayOptions, world: World) -> Replayed:
    """Takes the step in memory, and writes batch.png and step.json. Every process must call it.

    Raises:
        ConfigError: the run has no such step, or its batches aren't functions of the step.
        CheckpointError: the checkpoint isn't of this run.
    """
    config, step = options.config, options.step
    run = Path(config.folder)
    path = cast("Path | None", world.broadcast_object(_nearest(run, step) if world.is_main else None))
    task = PretrainTask(config, world, starting=path is None)
    if isinstance(task.source, StreamSource):
        raise ConfigError("data.reader is stream, whose batches aren't functions of the step, so none can be replayed")
    if not task.first_step <= step < task.last_step:
        raise ConfigError(f"step is {step}, but the steps of {run} are {task.first_step} to {task.last_step - 1}")
    task.spikes = SpikeJudge(config.spikes, run=str(run), log=world.is_main)
    task.engine.judged_by(task.spikes)
    begin = task.first_step
    if path is not None:
        checkpoint = store.whole(path, world)
        check_continues(checkpoint, task)
        load_state_of(checkpoint, task)
        begin = checkpoint.step
    loader = task.loader(begin if options.exact else step)
    batches = iter(loader)
    batch = next(batches)
    while batch.step < step:
        _take(task, batch, path)
        batch = next(batches)
    found = _measure(task, batch, step if options.exact else begin, path)
    if world.is_main:
        options.to.mkdir(parents=True, exist_ok=True)
    shown = [sample.position for sample in found.worst]
    mine = [one for one in batch.split(len(batch)) if one.position in shown]
    parts = world.gather_objects({one.position: with_masks(task, one) for one in mine})
    if world.is_main:
        pictures = {position: shown for part in cast(list[dict], parts) for position, shown in part.items()}
        images, context, targets = zip(*(pictures[position] for position in shown), strict=True)
        draw_masks(torch.cat(images), np.concatenate(context), np.concatenate(targets), options.to / "batch.png")
        (options.to / "step.json").write_text(_json(found))
    return found


def _nearest(run: Path, step: int) -> Path | None:
    """Returns the newest checkpoint without the step; the state of a run that ended at the step is the very one."""
    stopped = store.newest(run / "stopped")
    if stopped is not None and step_of(stopped) == step:
        return stopped
    return next((path for path in reversed(named(run / "checkpoints")) if step_of(path) <= step), None)


def _take(task: PretrainTask, batch: Batch, start: Path | None) -> None:
    """Takes a step as the run did, which may have left it out or gone back after it."""
    task.step(batch)
    task.engine.settle()
    if task.spikes.roll_back is not None:
        roll_back(task, start)


def _measure(task: PretrainTask, batch: Batch, done: int, path: Path | None) -> Replayed:
    """Returns the losses and gradients of a step after `done` steps, and takes it."""
    world = task.world
    mine = [_sample(task, single) for single in batch.split(len(batch))]
    samples = [sample for part in world.gather_objects(mine) for sample in cast(list[Sample], part)]
    # values that aren't finite are what is looked for
    task.engine.judged_by(SpikeJudge(SpikesConfig(action="none", skip_nonfinite=1), log=False))
    info = task.measured_step(batch)
    norm = torch.as_tensor(info.grad_norm, dtype=torch.float32, device=world.device)  # as the meters take it
    return Replayed(
        step=batch.step,
        epoch=batch.epoch,
        weights="the start of the run" if path is None else str(path),
        weights_step=done,
        loss=float(world.mean(info.loss.double())),
        grad_norm=float(world.mean(norm.double())),
        block_norms={name: float(norm) for name, norm in (info.block_norms or {}).items()},
        samples=samples,
        row=_row_of(Path(task.config.folder), batch.step, task.first_step),
    )


@torch.no_grad()
def _sample(task: PretrainTask, single: Batch) -> Sample:
    number, device = int(single.sample_ids[0]), task.world.device
    images = task.augment(single.to(device))
    masks = task.masks(single.step, single.position, 1, task.batch_size)
    wanted = Wanted.of(masks, 1, math.prod(task.masks.grid)).map(lambda tensor: tensor.to(device))
    masks = masks.map(lambda tensor: tensor.to(device))
    tokens = task.engine.target(images, wanted=wanted.patches)
    loss = task.objective(task.engine.evaluate(images, masks), tokens, masks, wanted)
    assert not isinstance(task.source, StreamSource)
    return Sample(
        position=single.position,
        sample_id=number,
        name=task.source.name(number),
        label=int(single.labels[0]),
        loss=float(loss),
    )


def _row_of(run: Path, step: int, first: int) -> dict[str, float | None] | None:
    """Returns loss and gradient norm of the run's row of this one step; rows of several steps hold means."""
    rows = [row for row in read_rows(run / JSONL_NAME) if "loss" in row]
    ends = {row["step"]: row for row in rows}
    if step + 1 not in ends or (step > first and step not in ends):
        return None
    return {name: ends[step + 1][name] for name in ("loss", "grad_norm")}


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _json(found: Replayed) -> str:
    """Returns the result as JSON, which has no NaN."""
    values = dataclasses.asdict(found)
    for holder in (values, values["block_norms"], *values["samples"]):
        for name, value in holder.items():
            if isinstance(value, float) and not math.isfinite(value):
                holder[name] = None
    return json.dumps(values, indent=2, allow_nan=False) + "\n"

"""The measurements of a child process: steps with drawn masks, then a step with the longest ones.

Everything is built as in training (`PretrainTask`), except the source of images and the masks of the last step. Knows
nothing of the search.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import PixelRules
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.open import training_order, training_source
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.engine.start import start_world
from ijepa_scale.engine.world import World, choose_device
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.planning.flops import mask_flops
from ijepa_scale.train.pretrain import PretrainTask
from ijepa_scale.train.setup import global_batch, pixels_of
from ijepa_scale.train.step import TrainStep
from ijepa_scale.tune.children import ProcessInfo
from ijepa_scale.tune.machine import Machine, PeakMemory, describe
from ijepa_scale.tune.worst import ProbeMasks

_ENDLESS = 1_000_000  # steps; more than any measurement takes


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """The steps to measure. The configuration is the candidate's, so its strategy isn't `auto`."""

    config: PretrainConfig
    devices: tuple[str, ...] | None
    warmup: int  # steps before the timed ones
    steps: int
    worst: Lengths
    loader: bool = False  # take images from the configuration's data instead of repeating synthetic ones


@dataclass(frozen=True, kw_only=True)
class LoaderJob:
    """The loader to measure, with the configuration's number of workers."""

    config: PretrainConfig
    seconds: float  # to measure for, after the first batches


def describe_machine(asked: tuple[PretrainConfig, list[str] | None, int], process: ProcessInfo) -> dict[str, Any]:
    """Returns the fields of `Machine` for this host."""
    config, devices, processes = asked
    return dataclasses.asdict(describe(config.engine, devices, processes))


def machine_of(values: dict[str, Any]) -> Machine:
    """Returns the machine that a child process has described."""
    return Machine(**values)


def measure_steps(job: StepJob, process: ProcessInfo) -> dict[str, Any]:
    """Measures the time of each step, its wait for data, the peak memory of drawn and worst steps, and FLOPs.

    Notes the phase, and the measurements before the worst step, so that the parent knows them even if this process
    dies.

    Raises:
        UserError: the candidate can't run; other errors of the step are passed on.
    """
    process.note(phase="while it was built")
    name = job.devices[process.rank] if job.devices else None
    device = choose_device(job.config.engine, process.launch, name)
    world = start_world(process.launch, device, alone=job.config.engine.strategy == "plain")
    run = PretrainTask(job.config if job.loader else _synthetic(job.config, world.size), world)
    masks = ProbeMasks(run.masks, job.worst, worst_from=job.warmup + job.steps)
    step = TrainStep(
        run.engine,
        augment=run.augment,
        masks=masks,
        schedule=lambda index: run.schedule(min(index, run.schedule.total_steps - 1)),
        objective=build_objective(job.config.objective, triton=job.config.engine.triton),
        batch_size=run.batch_size,
        meters=run.meters,
    )
    memory = PeakMemory(device)
    batches = _batches(run, job)
    process.note(phase="in the first steps")
    for batch in itertools.islice(batches, job.warmup):
        step(batch)
    run.engine.settle()
    memory.reset()
    process.note(phase="in the steps over drawn masks")
    step_s, wait_s, batch = _timed(batches, step, job.steps, world)
    peak = memory.read()
    drawn = {
        "step_s": step_s,
        "wait_s": wait_s,
        "peak_bytes": peak,
        "flops_per_image": _flops_per_image(run, job, len(batch)),
        "attention": ", ".join(dict.fromkeys(run.engine.attention.values())),
    }
    process.note(phase="in the step with the longest masks", **drawn)
    memory.reset()
    step(dataclasses.replace(batch, step=job.warmup + job.steps))
    run.engine.settle()
    _wait_for(device)
    batches.close()
    return {**drawn, "worst_bytes": max(peak, memory.read())}


def _timed(
    batches: Iterator[Batch], step: TrainStep, count: int, world: World
) -> tuple[list[float], list[float], Batch]:
    """Returns the seconds of each of `count` steps, the seconds of them spent waiting for data, and the last batch."""
    step_s, wait_s = [], []
    batch = None
    world.barrier()
    for _ in range(count):
        _wait_for(world.device)
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        step(batch)
        _wait_for(world.device)
        step_s.append(time.perf_counter() - begin)
        wait_s.append(waited)
    assert batch is not None
    return step_s, wait_s, batch


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # host sync: the clock must not be read before the device is done


def _synthetic(config: PretrainConfig, processes: int) -> PretrainConfig:
    """Returns the configuration with its data replaced by synthetic images, made in this process."""
    data = config.data
    samples = max(data.synthetic_samples, global_batch(config, processes))
    data = data.replace(reader="synthetic", train=None, workers=0, synthetic_samples=samples)
    return config.replace(data=data)


def _batches(run: PretrainTask, job: StepJob) -> Generator[Batch, None, None]:
    """Yields this process's batches for steps 0, 1, ...: from the loader, or the same batch again and again."""
    world = run.world
    reader = _reader(run.config, run.source, run.order, rank=world.rank, world=world.size, device=world.device)
    if job.loader:
        yield from reader
    batch = next(iter(reader)).clone().to(world.device)
    for step in itertools.count():
        yield dataclasses.replace(batch, step=step)


def _reader(
    config: PretrainConfig,
    source: SampleSource | StreamSource,
    order: SampleOrder | StreamOrder,
    *,
    rank: int,
    world: int,
    device: torch.device | str = "cpu",
) -> TrainLoader:
    """Returns the run's loader, but without the run's last step."""
    return TrainLoader(
        source,
        order,
        config.augment,
        config.model.image_size,
        seed=config.seed,
        rules=PixelRules(config.data.exif, config.data.decode_scaling, pixels_of(config)),
        rank=rank,
        world=world,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        stop_step=_ENDLESS,
        max_bad_fraction=config.data.max_bad_fraction,
        device=device,
    )


def _flops_per_image(run: PretrainTask, job: StepJob, share: int) -> float:
    """Returns the FLOPs of one image in a step, averaged over the masks of this process's timed steps."""
    first = run.world.rank * share
    counts = [
        mask_flops(run.config.model, run.masks(step, first, share, run.batch_size), num_images=share).total
        for step in range(job.warmup, job.warmup + job.steps)
    ]
    return sum(counts) / len(counts)


def measure_loader(job: LoaderJob, process: ProcessInfo) -> dict[str, Any]:
    """Returns the images per second that this process's loader delivers to the host while all processes read.

    Starts the clock only after as many batches as can be prefetched.

    Raises:
        UserError: the data can't be read.
    """
    config, data = job.config, job.config.data
    height, width = (max(256, side) for side in config.model.image_size)  # the size of synthetic images
    source = training_source(data, (height, width), config.model.channels)
    if not isinstance(source, StreamSource):
        check_problems(source.problems(), source.num_samples, data.max_bad_fraction, log=False)
    batch_size = global_batch(config, process.size)
    order = training_order(data, source, batch_size, seed=config.seed, steps_per_epoch=config.schedule.steps_per_epoch)
    batches = iter(_reader(config, source, order, rank=process.rank, world=process.size))
    for _ in range(1 + data.workers * data.prefetch):
        next(batches)
    images, begin = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - begin < job.seconds:
        images += len(next(batches))
    seconds = time.perf_counter() - begin
    del batches  # ends its workers, whose semaphores would be reported as leaked
    return {"images_per_s": images / seconds}

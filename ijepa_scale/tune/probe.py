"""What a child process measures: steps over drawn masks, then one over the longest. Picks nothing.

Everything is the run's own (`build_run`), apart from where images come from and which masks the last step has.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ijepa_kernels.attention.backend import HeadShape, backend_for
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.open import training_order, training_source
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.engine.world import World, choose_device, start_world
from ijepa_scale.planning.flops import mask_flops
from ijepa_scale.train.setup import Run, build_run, global_batch
from ijepa_scale.train.step import TrainStep
from ijepa_scale.tune.children import Place
from ijepa_scale.tune.machine import Machine, PeakMemory, describe
from ijepa_scale.tune.worst import Lengths, ProbeMasks

_ENDLESS = 1_000_000  # steps


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """Steps to measure. The configuration is the candidate's; its strategy isn't `auto`."""

    config: PretrainConfig
    devices: tuple[str, ...] | None
    warmup: int  # steps that aren't counted
    steps: int
    worst: Lengths
    loader: bool = False  # take images from the configuration's data instead of repeating synthetic ones


@dataclass(frozen=True, kw_only=True)
class LoaderJob:
    """Reading to measure, with the configuration's number of workers."""

    config: PretrainConfig
    seconds: float  # at most, after the first batch


def describe_machine(asked: tuple[PretrainConfig, list[str] | None, int], place: Place) -> dict[str, Any]:
    """Returns the fields of `Machine` as this host has them."""
    config, devices, processes = asked
    return dataclasses.asdict(describe(config.engine, devices, processes))


def machine_of(values: dict[str, Any]) -> Machine:
    """Returns the machine that a child has described."""
    return Machine(**values)


def measure_steps(job: StepJob, place: Place) -> dict[str, Any]:
    """Returns seconds of each step and of waiting for its data, peak bytes of drawn and of worst steps, and FLOPs.

    Notes its phase, and what is measured before the worst step, so that a death says where it came.

    Raises:
        UserError: the candidate can't run; whatever else the step raises passes through.
    """
    place.note(phase="while it was built")
    name = job.devices[place.rank] if job.devices else None
    device = choose_device(job.config.engine, place.launch, name)
    world = start_world(place.launch, device, alone=job.config.engine.strategy == "plain")
    run = build_run(job.config if job.loader else _synthetic(job.config, world.size), world)
    masks = ProbeMasks(run.masks, job.worst, worst_from=job.warmup + job.steps)
    step = TrainStep(
        run.engine,
        augment=run.augment,
        masks=masks,
        schedule=lambda index: run.schedule(min(index, run.schedule.total_steps - 1)),
        objective=job.config.objective,
        batch_size=run.batch_size,
        meters=run.meters,
    )
    memory = PeakMemory(device)
    batches = _batches(run, job)
    place.note(phase="in the first steps")
    for batch in itertools.islice(batches, job.warmup):
        step(batch)
    run.engine.settle()
    memory.reset()
    place.note(phase="in the steps over drawn masks")
    step_s, wait_s, batch = _timed(batches, step, job.steps, world)
    peak = memory.read()
    drawn = {
        "step_s": step_s,
        "wait_s": wait_s,
        "peak_bytes": peak,
        "flops_per_image": _flops_per_image(run, job, len(batch)),
        "attention": _attention(run),
    }
    place.note(phase="in the step with the longest masks", **drawn)
    memory.reset()
    step(dataclasses.replace(batch, step=job.warmup + job.steps))
    run.engine.settle()
    _wait_for(device)
    batches.close()
    return {**drawn, "worst_bytes": max(peak, memory.read())}


def _timed(
    batches: Iterator[Batch], step: TrainStep, count: int, world: World
) -> tuple[list[float], list[float], Batch]:
    """Returns the seconds of each of `count` steps, those of them spent waiting for data, and the last batch."""
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
        torch.cuda.synchronize(device)  # host sync: the clock must not be read ahead of the device


def _synthetic(config: PretrainConfig, processes: int) -> PretrainConfig:
    """Returns the configuration with synthetic images, made in this process, in the place of its data."""
    data = config.data
    samples = max(data.synthetic_samples, global_batch(config, processes))
    data = data.replace(reader="synthetic", train=None, workers=0, synthetic_samples=samples)
    return config.replace(data=data)


def _batches(run: Run, job: StepJob) -> Generator[Batch, None, None]:
    """Yields this process's batches of steps 0, 1, ...: from the loader, or one batch again and again."""
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
    """Returns the run's loader, but one that goes on however short the run is."""
    return TrainLoader(
        source,
        order,
        config.augment,
        config.model.image_size,
        seed=config.seed,
        rank=rank,
        world=world,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        stop_step=_ENDLESS,
        max_bad_fraction=config.data.max_bad_fraction,
        device=device,
    )


def _flops_per_image(run: Run, job: StepJob, share: int) -> float:
    """Returns the FLOPs of one image in a step, the mean over the masks of the timed steps of this process."""
    first = run.world.rank * share
    counts = [
        mask_flops(run.config.model, run.masks(step, first, share, run.batch_size), num_images=share).total
        for step in range(job.warmup, job.warmup + job.steps)
    ]
    return sum(counts) / len(counts)


def _attention(run: Run) -> str:
    """Returns the kernel that dense attention of this model's encoder runs in here."""
    dtype = torch.bfloat16 if run.config.engine.precision == "bf16" else torch.float32
    sizes = resolve(run.config.model)
    tokens = sizes.num_patches
    shape = HeadShape("encoder", sizes.heads, sizes.width // sizes.heads, tokens, tokens)
    return backend_for(shape, dtype, run.world.device)


def measure_loader(job: LoaderJob, place: Place) -> dict[str, Any]:
    """Returns the images per second that this process's loader delivers to the host, all processes reading at once.

    What had been prefetched when the clock started is waited for first.

    Raises:
        UserError: data that can't be read.
    """
    config, data = job.config, job.config.data
    height, width = (max(256, side) for side in config.model.image_size)  # of synthetic images
    source = training_source(data, (height, width))
    if not isinstance(source, StreamSource):
        check_problems(source.problems(), source.num_samples, data.max_bad_fraction, log=False)
    batch_size = global_batch(config, place.size)
    order = training_order(data, source, batch_size, seed=config.seed, steps_per_epoch=config.schedule.steps_per_epoch)
    batches = iter(_reader(config, source, order, rank=place.rank, world=place.size))
    for _ in range(1 + data.workers * data.prefetch):
        next(batches)
    images, begin = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - begin < job.seconds:
        images += len(next(batches))
    seconds = time.perf_counter() - begin
    del batches  # ends its workers, whose semaphores would count as leaked
    return {"images_per_s": images / seconds}

"""Question: how much of the speed on synthetic images is left when images come from tar shards?

python -m benchmarks.end_to_end --model vit_tiny --image-size 224 --patch-size 16 --batch 16 [--images FOLDER_OR_TAR]
    [--workers 1] [--steps N] [--device cuda] [--precision bf16] [--to FILE] [--plot FILE] [section.key=value ...]

Our side reads shards in workers, copies the crops to the device, resizes them there and runs the real step; it is also
measured on images that are already on the device. The clock starts after the warm-up, in which kernels are compiled,
and after as many further steps as the loader holds batches ahead: those were decoded while the step compiled. A short
run through the training loop, with checkpoints and evaluations, gives images per second of wall time. The baseline is
torchvision's ImageFolder and DataLoader, whose workers also draw masks in a loop over images, with the eager step. It
trains on our masks, so both sides do the same amount of training. Reports wall time in windows of steps, and CPU time
including the workers. Without --images the run generates JPEGs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline_masks import LoopMasks
from benchmarks.common import Row, draw_bars, percentiles, read_rows, record, table
from benchmarks.loader import cpu_seconds
from benchmarks.pictures import folder_of, shards_of
from benchmarks.synthetic import (
    Baseline,
    Draws,
    add_model_flags,
    alone,
    batch_of,
    configured,
    images_for,
    settings_of,
    start,
)
from ijepa_scale import rng
from ijepa_scale.config import AugmentConfig, PretrainConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.protocol import StepInfo
from ijepa_scale.metrics.meters import DATA_WAIT, STEP, Meters
from ijepa_scale.metrics.sinks import JSONL_NAME
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.train.loop import Loop
from ijepa_scale.train.pretrain import PretrainTask
from ijepa_scale.train.run_folder import held
from ijepa_scale.train.step import TrainStep

WINDOW = {"cpu": 2, "cuda": 5}  # steps between reads of the clock
WARM_UP = {"cpu": 2, "cuda": 10}  # steps in which kernels are compiled
LEAST = {"cpu": 8, "cuda": 80}  # measured steps: on a GPU, more than any buffer of batches
SYNTHETIC, SHARDS, RUN, BASELINE = (
    "ours, synthetic", "ours, from shards", "ours, whole run", "eager baseline, ImageFolder",
)  # fmt: skip


def held_ahead(config: PretrainConfig) -> int:
    """Returns how many batches our loader can hold: prepared by workers, being copied, and in use."""
    return config.data.workers * config.data.prefetch + 3


def windows(batches: Iterable[Any], work: Any, meters: Meters, *, first: int, window: int) -> list[dict[str, float]]:
    """Returns the meters' means for each window of steps after the `first` ones: step time and data wait, ms."""
    found: list[dict[str, float]] = []
    for done, batch in enumerate(meters.timed(batches), start=1 - first):
        work(batch)
        if done == 0:
            meters.flush()  # starts the clock
        elif done > 0 and done % window == 0:
            found.append(meters.flush())
    return found


def synthetic_step(run: PretrainTask, images: torch.Tensor) -> TrainStep:
    """Returns the run's step with its augmentation replaced by images that are already on the device."""
    return TrainStep(
        run.engine,
        augment=lambda micro: images[micro.position :][: len(micro)],
        masks=run.masks,
        schedule=run.schedule,
        objective=build_objective(run.config.objective, triton=run.config.engine.triton),
        batch_size=run.batch_size,
        meters=run.meters,
    )


def measure_ours(config: PretrainConfig, device: torch.device, steps: int) -> Iterator[Row]:
    """Yields the rows of our step on synthetic images, then from shards, with the same weights."""
    batch = config.data.batch_size or 0
    run, window, warm = PretrainTask(config, alone(device)), WINDOW[device.type], WARM_UP[device.type]
    step, begin = synthetic_step(run, images_for(config, batch, device)), cpu_seconds()
    batches = (batch_of(number, batch) for number in range(warm + steps // 2))
    found = windows(batches, step, run.meters, first=warm, window=window)
    yield row_of(SYNTHETIC, config, found, cpu_s=cpu_seconds() - begin, dropped=warm, steps=steps // 2)
    first, begin = warm + held_ahead(config), cpu_seconds()
    found = windows(run.loader(0), run.step, run.meters, first=first, window=window)
    yield row_of(SHARDS, config, found, cpu_s=cpu_seconds() - begin, dropped=first, steps=steps)


class TimedTask(PretrainTask):
    """A pretraining run that notes when its second step begins; the first one compiles."""

    second_step_at: float

    def step(self, batch: Batch) -> StepInfo:
        """Takes one optimiser step."""
        if batch.step == 1:
            self.second_step_at = time.perf_counter()
        return super().step(batch)


def measure_run(config: PretrainConfig, device: torch.device) -> Row:
    """Returns the row of a run through the training loop, whose wall time counts from its second step to its end."""
    world = alone(device)
    with held(Path(config.folder), world):
        task = TimedTask(config, world)
        loop, cpu = Loop(task, None), cpu_seconds()
        task.prepare_evaluation()
        loop.train()
    wall_s, steps = time.perf_counter() - task.second_step_at, task.last_step - 1
    rows = [row for row in read_rows(Path(config.folder) / JSONL_NAME) if STEP in row]
    ends = [1, *(row["step"] for row in rows)]
    weights = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    found = {name: float(np.average([row[name] for row in rows], weights=weights)) for name in (STEP, DATA_WAIT)}
    row = row_of(RUN, config, [found], cpu_s=cpu_seconds() - cpu, dropped=1, steps=steps)
    every = {"checkpoint_every": config.checkpoint.every, "evaluate_every": config.evaluate.every}
    rate = percentiles([steps * task.batch_size / wall_s])
    return {**row, **rate, **every, "wall_s": wall_s, "outside_steps_s": wall_s - steps * found[STEP] / 1e3}


def measure_baseline(config: PretrainConfig, device: torch.device, steps: int, folder: Path) -> Row:
    """Returns the row of the eager step, fed by torchvision."""
    from torchvision import datasets, transforms

    batch, augment = config.data.batch_size or 0, AugmentConfig()
    crop = transforms.RandomResizedCrop(config.model.image_size, scale=augment.crop_scale, ratio=augment.crop_ratio)
    chain = transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(augment.mean, augment.std)])
    images, workers, window = datasets.ImageFolder(str(folder), chain), config.data.workers, WINDOW[device.type]
    first = WARM_UP[device.type] + 2 * workers  # by default, torch's loader holds two batches per worker
    sampler = torch.utils.data.RandomSampler(
        images, replacement=True, num_samples=(first + steps) * batch, generator=rng.generator(0, "benchmark")
    )
    loader = torch.utils.data.DataLoader(
        images,
        batch,
        sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(config),
        pin_memory=device.type == "cuda",
    )
    draws = Draws(config, device)
    for step in range(first + steps):
        draws(step)
    work = Baseline(config, start(config), torch.empty(0, device=device), draws)

    def train(item: tuple[int, Any]) -> None:
        step, (pictures, _) = item
        work.images = pictures.to(device, non_blocking=True)
        work(step)
        meters.count_step()

    meters, begin = Meters(device), cpu_seconds()
    found = windows(enumerate(loader), train, meters, first=first, window=window)
    return row_of(BASELINE, config, found, cpu_s=cpu_seconds() - begin, dropped=first, steps=steps)


class Collate:
    """Stacks images and draws their masks image by image, as the published code does in its workers."""

    def __init__(self, config: PretrainConfig) -> None:
        masks = config.masks.replace(sampler="reference", context="truncate")
        self._masks, self._calls = LoopMasks(masks, config.model.grid), 0

    def __call__(self, samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, Any]:
        """Returns the images and their masks. The time of the masks counts, but training uses ours instead."""
        self._calls += 1
        generator = rng.generator(0, "benchmark masks", self._calls)
        return torch.stack([image for image, _ in samples]), self._masks(self._calls, len(samples), generator)


def row_of(
    side: str, config: PretrainConfig, found: list[dict[str, float]], *, cpu_s: float, dropped: int, steps: int
) -> Row:
    """Returns the row of a side: `steps` measured ones, in windows, after `dropped` ones. CPU time counts all."""
    batch = config.data.batch_size or 0
    return {
        "benchmark": "end to end",
        "side": side,
        "model": config.model.name,
        "image_size": config.model.image_size[0],
        "patch_size": config.model.patch_size,
        "batch": batch,
        "precision": config.engine.precision,
        "workers": config.data.workers,
        "steps": steps,
        "dropped_steps": dropped,
        "unit": "images/s",
        **percentiles([1e3 * batch / each[STEP] for each in found]),
        "data_wait_share": percentiles([each[DATA_WAIT] / each[STEP] for each in found]),
        "cpu_ms_per_image": 1e3 * cpu_s / ((dropped + steps) * batch),
    }


def measure(settings: list[str], options: argparse.Namespace, folder: Path, shards: Path) -> Iterator[Row]:
    """Yields the rows of all sides, each relative to our synthetic step, which comes first."""
    device, steps, half = torch.device(options.device), options.steps, options.steps // 2
    own = [*settings, f"data.train={shards}", "data.reader=shards", f"data.workers={options.workers}"]
    config = configured(own)
    stop = WARM_UP[device.type] + held_ahead(config) + steps
    run = [
        f"folder={shards.parent / 'run'}", f"schedule.stop_after={half}", f"checkpoint.every={half}",
        "checkpoint.keep=1", f"evaluate.every={half // 2}", f"evaluate.train={shards}",
        f"evaluate.test={shards}", "logging.progress=none",
    ]  # fmt: skip

    def sides() -> Iterator[Row]:
        yield from measure_ours(configured([*own, f"schedule.stop_after={stop}"]), device, steps)
        cleared(device)
        yield measure_run(configured([*own, *run]), device)
        cleared(device)
        yield measure_baseline(config, device, steps // 4, folder)

    synthetic = None
    for row in sides():
        synthetic = row["p50"] if synthetic is None else synthetic
        yield {**row, "of_synthetic": row["p50"] / synthetic}


def cleared(device: torch.device) -> None:
    """Frees what the previous side left on the device, and its graphs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def report(rows: list[Row]) -> str:
    """Returns the results as a Markdown table, and what the whole run did besides steps."""
    medians = {row["side"]: row["p50"] for row in rows}
    lines = [
        [
            row["side"],
            f"{row['p20']:.2f} - {row['p50']:.2f} - {row['p80']:.2f}",
            f"{row['data_wait_share']['p50']:.1%}",
            f"{row['cpu_ms_per_image']:.0f}",
            f"{row['of_synthetic']:.1%}",
            f"{row['p50'] / medians[BASELINE]:.2f}",
            f"{row['steps']} after {row['dropped_steps']}",
        ]
        for row in rows
    ]
    header = [
        "side", "images/s", "waiting for data", "CPU ms per image", "of the synthetic step", "times the baseline",
        "steps",
    ]  # fmt: skip
    run = next(row for row in rows if row["side"] == RUN)
    said = (
        f"The whole run writes a checkpoint every {run['checkpoint_every']} steps and evaluates every "
        f"{run['evaluate_every']}: {run['outside_steps_s']:.1f} of {run['wall_s']:.1f} s are outside steps."
    )
    return f"{table(header, lines)}\n\n{said}"


def main() -> None:
    """Runs the benchmark, prints its table, and writes the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(model="vit_tiny", batch=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--images", type=Path, help="folder or tar of class folders (default: generated JPEGs)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--steps",
        type=int,
        help="measured steps from shards, by default 16 on the CPU and 80 on a GPU; half as many on synthetic "
        "images and in the whole run, a quarter with the baseline",
    )
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    least, unit = LEAST[options.device], 4 * WINDOW[options.device]
    options.steps = options.steps or max(16, least)
    if options.steps < least or options.steps % unit:
        parser.error(f"--steps is {options.steps}; on {options.device} give a multiple of {unit}, at least {least}")
    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder_of(options.images, Path(scratch))
        shards = shards_of(folder, Path(scratch))
        rows = record(options.to, measure(settings_of(options, options.precision), options, folder, shards))
    print(report(rows))
    if options.plot:
        draw_bars({row["side"]: row["p50"] for row in rows}, options.plot, "images per second")


if __name__ == "__main__":
    main()

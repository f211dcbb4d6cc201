"""Question: how much of the speed on synthetic images is left when images come from tar shards?

python -m benchmarks.end_to_end --model vit_tiny --image-size 224 --patch-size 16 --batch 16 [--images FOLDER_OR_TAR]
    [--workers 1] [--steps N] [--device cuda] [--precision bf16] [--to FILE] [--plot FILE] [section.key=value ...]

Our side reads shards in workers, copies the crops to the device, resizes them there and runs the real step; it is also
measured on images that are already on the device. The baseline is torchvision's ImageFolder and DataLoader, whose
workers also draw masks in a loop over images, with the eager step. It trains on our masks, so both sides do the same
amount of training. Reports wall time in windows of steps, and CPU time including the workers. Without --images the run
generates JPEGs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.baseline_masks import LoopMasks
from benchmarks.common import append, draw_bars, percentiles, table
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
from ijepa_scale.metrics.meters import DATA_WAIT, STEP, Meters
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.train.pretrain import PretrainTask
from ijepa_scale.train.step import TrainStep

WINDOW = {"cpu": 2, "cuda": 5}  # steps between reads of the clock
WARM_UP = 2  # windows that aren't counted


def windows(batches: Iterable[Any], work: Any, meters: Meters, window: int) -> list[dict[str, float]]:
    """Returns the meters' means for each window of steps after the warm-up: step time and data wait, milliseconds."""
    found = []
    for done, batch in enumerate(meters.timed(batches), start=1):
        work(batch)
        if done % window == 0:
            found.append(meters.flush())
    return found[WARM_UP:]


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


def measure_ours(config: PretrainConfig, device: torch.device, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the measurements of our step from shards, then on synthetic images, with the same weights."""
    batch = config.data.batch_size or 0
    run, window = PretrainTask(config, alone(device)), WINDOW[device.type]
    found = {}
    begin = cpu_seconds()
    found["ours, from shards"] = {"windows": windows(run.loader(0), run.step, run.meters, window)}
    found["ours, from shards"]["cpu_s"] = cpu_seconds() - begin
    step = synthetic_step(run, images_for(config, batch, device))
    begin = cpu_seconds()
    batches = (batch_of(number, batch) for number in range(steps))
    found["ours, synthetic"] = {"windows": windows(batches, step, run.meters, window)}
    found["ours, synthetic"]["cpu_s"] = cpu_seconds() - begin
    return found


def measure_baseline(
    config: PretrainConfig, device: torch.device, steps: int, *, folder: Path, workers: int
) -> dict[str, Any]:
    """Returns the measurements of the eager step, fed by torchvision."""
    from torchvision import datasets, transforms

    batch, augment = config.data.batch_size or 0, AugmentConfig()
    crop = transforms.RandomResizedCrop(config.model.image_size, scale=augment.crop_scale, ratio=augment.crop_ratio)
    chain = transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(augment.mean, augment.std)])
    images = datasets.ImageFolder(str(folder), chain)
    sampler = torch.utils.data.RandomSampler(
        images, replacement=True, num_samples=steps * batch, generator=rng.generator(0, "benchmark")
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
    for step in range(steps):
        draws(step)
    work = Baseline(config, start(config), torch.empty(0, device=device), draws)

    def train(item: tuple[int, Any]) -> None:
        step, (pictures, _) = item
        work.images = pictures.to(device, non_blocking=True)
        work(step)
        meters.count_step()

    meters, begin = Meters(device), cpu_seconds()
    found = windows(enumerate(loader), train, meters, WINDOW[device.type])
    return {"windows": found, "cpu_s": cpu_seconds() - begin}


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


def rows_of(found: dict[str, dict[str, Any]], config: PretrainConfig, steps: int, workers: int) -> list[dict[str, Any]]:
    """Returns a row for each side, with its speed relative to the synthetic step and to the baseline."""
    batch = config.data.batch_size or 0
    rates = {name: [1e3 * batch / each[STEP] for each in side["windows"]] for name, side in found.items()}
    medians = {name: percentiles(values)["p50"] for name, values in rates.items()}
    rows = []
    for name, side in found.items():
        waits = [each[DATA_WAIT] / each[STEP] for each in side["windows"]]
        rows.append(
            {
                "benchmark": "end to end",
                "side": name,
                "model": config.model.name,
                "image_size": config.model.image_size[0],
                "patch_size": config.model.patch_size,
                "batch": batch,
                "precision": config.engine.precision,
                "workers": workers,
                "unit": "images/s",
                **percentiles(rates[name]),
                "data_wait_share": percentiles(waits),
                "cpu_ms_per_image": 1e3 * side["cpu_s"] / (steps * batch),
                "of_synthetic": medians[name] / medians["ours, synthetic"],
                "times_baseline": medians[name] / medians["eager baseline, ImageFolder"],
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        [
            row["side"],
            f"{row['p20']:.2f} - {row['p50']:.2f} - {row['p80']:.2f}",
            f"{row['data_wait_share']['p50']:.1%}",
            f"{row['cpu_ms_per_image']:.0f}",
            f"{row['of_synthetic']:.1%}",
            f"{row['times_baseline']:.2f}",
        ]
        for row in rows
    ]
    header = ["side", "images/s", "waiting for data", "CPU ms per image", "of the synthetic step", "times the baseline"]
    return table(header, lines)


def main() -> None:
    """Runs the benchmark, prints its table, and writes the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.set_defaults(model="vit_tiny", batch=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--images", type=Path, help="folder or tar of class folders (default: generated JPEGs)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="steps of each side, including the warm-up")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device(options.device)
    if options.device == "cpu":
        torch.set_num_threads(1)
    least = (WARM_UP + 1) * WINDOW[options.device]
    if options.steps < least:
        parser.error(f"--steps is {options.steps}; give at least {least}, since {WARM_UP} windows of steps are warm-up")
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder_of(options.images, Path(scratch))
        own = [
            f"data.train={shards_of(folder, Path(scratch))}",
            "data.reader=shards",
            f"data.workers={options.workers}",
        ]
        stop = [f"schedule.stop_after={options.steps}"]
        config = configured([*settings_of(options, options.precision), *own, *stop])
        found = measure_ours(config, device, options.steps)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        begin = time.perf_counter()
        theirs = measure_baseline(config, device, options.steps, folder=folder, workers=options.workers)
        found["eager baseline, ImageFolder"] = theirs
        logging.info("baseline: %.0f s", time.perf_counter() - begin)
    rows = rows_of(found, config, options.steps, options.workers)
    for row in rows:
        append(options.to, row)
    print(report(rows))
    if options.plot:
        draw_bars({row["side"]: row["p50"] for row in rows}, options.plot, "images per second")


if __name__ == "__main__":
    main()

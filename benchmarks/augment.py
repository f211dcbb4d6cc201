"""Question: how many images per CPU-second does finetuning augmentation reach, batched here and by timm on PIL?

python -m benchmarks.augment --images FOLDER_OR_TAR [--device cuda] [--to benchmarks/results/augment.jsonl]

Both sides take turns in one run on the same photographs, which are decoded and cropped beforehand. On the CPU each runs
on one thread, and CPU-seconds are compared. With --device cuda ours is timed by a synchronised clock, while timm stays
on one core. The whole recipe is: resize, flip, RandAugment, normalise, random erasing, collate, mixup and CutMix.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.mixup import Mixup
from torchvision import transforms

from benchmarks.common import append, percentiles, table
from benchmarks.loader import class_folders
from ijepa_scale.augment.erasing import RandomErasing
from ijepa_scale.augment.mae import FinetuneAugment
from ijepa_scale.augment.mixing import Mixing
from ijepa_scale.augment.rand_augment import OPERATIONS, Canvas, RandAugment
from ijepa_scale.config.finetune_run import FinetuneAugmentConfig
from ijepa_scale.config.rand_augment_notation import parse
from ijepa_scale.data.batch import Batch
from ijepa_scale.data.decode import CROP_DRAWS, decode_crop
from ijepa_scale.data.sources.folder import ImageFolderSource

SIZE, CLASSES, RECIPE, FILL = (224, 224), 1000, "rand-m9-mstd0.5-inc1", (124, 116, 104)
CONFIG = FinetuneAugmentConfig()
HPARAMS = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
Work = Callable[[int], Any]  # takes the number of the turn


def load_crops(folder: Path, count: int) -> list[np.ndarray]:
    """Returns `count` crops (h, w, 3) uint8 of the first photographs, made as in training."""
    source = ImageFolderSource(folder)
    draws = np.random.default_rng(0).random((count, CROP_DRAWS)).tolist()
    options = {"scale": CONFIG.crop_scale, "ratio": CONFIG.crop_ratio}
    return [
        decode_crop(source.read(row % source.num_samples), draws[row], SIZE, **options).copy() for row in range(count)
    ]


def batch_of(crops: list[np.ndarray], turn: int) -> Batch:
    """Returns the crops as a batch whose random draws depend on the turn."""
    return Batch(
        pixels=torch.from_numpy(np.concatenate([crop.reshape(-1) for crop in crops])),
        sizes=np.array([crop.shape[:2] for crop in crops]),
        sample_ids=np.arange(len(crops)),
        labels=torch.arange(len(crops)) % CLASSES,
        step=turn,
        epoch=turn,
        position=0,
    )


def timms_chain() -> transforms.Compose:
    """Returns timm's training transform with a resize instead of its random crop: the images are crops already."""
    made = create_transform(
        SIZE[0], is_training=True, auto_augment=RECIPE, interpolation="bicubic", re_prob=0.25, re_mode="pixel"
    )
    resize = transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, *made.transforms[1:]])


def retried(apply: Callable[[Image.Image], Any], picture: Image.Image) -> Any:
    """Returns apply(picture); retries when a newer Pillow refuses timm's posterize to 0 bits at magnitude 10."""
    while True:
        try:
            return apply(picture)
        except ValueError as error:
            if "bits" not in str(error):
                raise


def recipes(crops: list[np.ndarray], device: torch.device) -> dict[str, tuple[Work, Work]]:
    """Returns (ours, timm's) for RandAugment and for the whole recipe."""
    pictures = [Image.fromarray(crop) for crop in crops]
    resized = [picture.resize(SIZE, Image.Resampling.BICUBIC) for picture in pictures]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in resized]).contiguous()
    images = images.to(device)
    ids = np.arange(len(crops))
    augment = RandAugment(parse(RECIPE), seed=0, fill=FILL)
    recipe = FinetuneAugment(CONFIG, SIZE, num_classes=CLASSES, seed=0, device=device)
    chain = timms_chain()
    (theirs,) = [step for step in chain.transforms if hasattr(step, "ops")]
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    labels = torch.arange(len(crops)) % CLASSES

    def timms_recipe(turn: int) -> Any:
        return mixup(torch.stack([retried(chain, picture) for picture in pictures]), labels)

    return {
        "RandAugment": (
            lambda turn: augment(images.clone(), epoch=turn, sample_ids=ids),
            lambda turn: [retried(theirs, picture) for picture in resized],
        ),
        "whole recipe": (lambda turn: recipe(batch_of(crops, turn)), timms_recipe),
    }


def operations(crops: list[np.ndarray], device: torch.device) -> dict[str, tuple[Work, Work]]:
    """Returns (ours, timm's) for each operation at magnitude 9, on as many images of a batch as get it in one layer."""
    few = [Image.fromarray(crop).resize(SIZE) for crop in crops[: max(1, len(crops) // 30)]]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in few]).contiguous()
    images = images.to(device)
    canvas = Canvas(torch.tensor(FILL, dtype=torch.uint8, device=device), "bicubic")
    values = np.resize([9.0, -9.0], len(few))
    found: dict[str, tuple[Work, Work]] = {}
    for name, operation in OPERATIONS.items():
        theirs = AugmentOp(name, prob=1.0, magnitude=9, hparams=HPARAMS)
        found[name] = (
            lambda turn, operation=operation: operation(images, values, canvas),
            lambda turn, theirs=theirs: [theirs(picture) for picture in few],
        )
    return found


def later_steps(crops: list[np.ndarray], device: torch.device) -> dict[str, Work]:
    """Returns our steps after RandAugment, and the part of them that runs on the host."""
    images = torch.zeros(len(crops), 3, *SIZE, device=device)
    labels, ids = (torch.arange(len(crops)) % CLASSES).to(device), np.arange(len(crops))
    erasing, mixing = RandomErasing(0.25, seed=0), Mixing(CONFIG, num_classes=CLASSES, seed=0)
    return {
        "random erasing": lambda turn: erasing(images, epoch=turn, sample_ids=ids),
        "mixup, CutMix": lambda turn: mixing(images, labels, step=turn, position=0),
        "drawing the shares": lambda turn: mixing.draw(SIZE, step=turn, position=0, count=len(crops)),
    }


def seconds(work: Work, turn: int, device: torch.device) -> float:
    """Returns the CPU-seconds of `work`; on a GPU, the seconds until the GPU has finished."""
    if device.type == "cpu":
        begin = time.process_time()
        work(turn)
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work(turn)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(
    pairs: dict[str, tuple[Work, Work]], rounds: int, device: torch.device
) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Yields each pair's name and the seconds of our and timm's work in each turn; the first turn only warms up."""
    for name, (ours, theirs) in pairs.items():
        found: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds + 1):
            random.seed(turn)
            np.random.seed(turn)
            torch.manual_seed(turn)
            spent = seconds(ours, turn, device), seconds(theirs, turn, torch.device("cpu"))
            if turn:
                for kept, value in zip(found, spent, strict=True):
                    kept.append(value)
        yield name, found


def main() -> None:
    """Runs the benchmark, prints its tables and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of class folders")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        crops = load_crops(class_folders(options.images, Path(scratch)), options.batch)
    about = {"benchmark": "augment", "on": str(device), "batch": options.batch, "size": SIZE[0], "unit": "images/s"}
    lines = []
    for name, both in compare(recipes(crops, device), options.rounds, device):
        rates = [percentiles([options.batch / value for value in values]) for values in both]
        ratio = percentiles([theirs / ours for ours, theirs in zip(*both, strict=True)])["p50"]
        lines.append([name, *(f"{r['p20']:.0f} - {r['p50']:.0f} - {r['p80']:.0f}" for r in rates), f"{ratio:.2f}"])
        append(options.to, {**about, "what": name, "ours": rates[0], "timm": rates[1], "ratio": ratio})
    print(table(["images per second, 20-50-80 %", f"ours, {device}", "timm on PIL, one core", "times timm's"], lines))
    few = max(1, options.batch // 30)
    print(f"\nRandAugment's operations at magnitude 9 on {few} images:\n")
    medians = {
        name: [1e6 * percentiles(values)["p50"] / few for values in both]
        for name, both in compare(operations(crops, device), options.rounds, device)
    }
    lines = [[name, *(f"{value:.0f}" for value in values)] for name, values in medians.items()]
    print(table(["microseconds per image", "ours", "timm on PIL"], lines))
    append(options.to, {**about, "what": "operations", "unit": "us/image, ours and timm", **medians})
    print(f"\nAfter RandAugment, {options.batch} images:\n")
    lines = []
    for name, work in later_steps(crops, device).items():
        spent = percentiles([seconds(work, turn, device) for turn in range(options.rounds + 1)][1:])
        lines.append([name, f"{1e3 * spent['p50']:.1f}"])
        append(options.to, {**about, "what": name, "unit": "s/batch", **spent})
    print(table(["step", "milliseconds per batch"], lines))


if __name__ == "__main__":
    main()

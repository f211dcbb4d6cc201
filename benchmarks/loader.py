"""Question: how many training images per CPU-second does this data path produce, compared with the classic ones?

python -m benchmarks.loader --images FOLDER_OR_TAR [--to benchmarks/results/loader.jsonl] [--plot docs/loader.png]

The folder or tar holds CLASS/*.jpg or train/CLASS/*.jpg. All paths read the same files in one run and take turns. Their
CPU-seconds (user and system, including workers) are compared within each turn. The page cache is warm, and each process
uses one thread.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.common import append, percentiles, table
from ijepa_scale.augment import Augment
from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.decode import CROP_DRAWS, decode_crop
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.shards.image_files import FolderImages
from ijepa_scale.data.shards.make import MakePlan, make_shards
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource

SIZE, BATCH, SHARD_BYTES = (224, 224), 50, 4 << 20
CONFIG = AugmentConfig()
CLASSIC = "torchvision ImageFolder"


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and its finished children, including those of the fork server."""
    own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    if server is None:
        return own
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return own + sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def ours(shards: Path, workers: int, epochs: int, *, augment: bool) -> int:
    """Reads through our path and returns the number of images; `augment` also resizes and normalises, on the CPU."""
    source = ShardSource(expand(shards))
    order = SampleOrder(source.shard_sizes, BATCH, 0, 4)
    steps = epochs * order.steps_per_epoch
    loader = TrainLoader(source, order, CONFIG, SIZE, seed=0, workers=workers, stop_step=steps)
    run = Augment(CONFIG, SIZE, seed=0) if augment else None
    for batch in loader:
        if run is not None:
            run(batch)
    return steps * BATCH


def torchvision_folder(folder: Path, workers: int, epochs: int) -> int:
    """Reads as the published code does and returns the number of images.

    The chain is PIL, RandomResizedCrop, ToTensor, Normalize.
    """
    from torchvision import datasets, transforms

    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=CONFIG.crop_scale, ratio=CONFIG.crop_ratio),
            transforms.ToTensor(),
            transforms.Normalize(CONFIG.mean, CONFIG.std),
        ]
    )
    images = datasets.ImageFolder(str(folder), chain)
    return _drain(torch.utils.data.DataLoader(images, BATCH, shuffle=True, num_workers=workers, drop_last=True), epochs)


def plain_webdataset(shards: Path, workers: int, epochs: int) -> int:
    """Reads through webdataset's usual pipeline and returns the number of images.

    The pipeline is decode("pil"), RandomResizedCrop, ToTensor, Normalize.
    """
    import webdataset
    from torchvision import transforms

    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=CONFIG.crop_scale, ratio=CONFIG.crop_ratio),
            transforms.ToTensor(),
            transforms.Normalize(CONFIG.mean, CONFIG.std),
        ]
    )
    names = [str(path) for path in expand(shards)]
    data = webdataset.WebDataset(names, shardshuffle=100, seed=0).shuffle(500).decode("pil").to_tuple("jpg", "cls")
    batches = data.map_tuple(chain, int).batched(BATCH, partial=False)
    return _drain(webdataset.WebLoader(batches, batch_size=None, num_workers=workers), epochs)


def dali(folder: Path, workers: int, epochs: int) -> int:
    """Reads through DALI on the CPU and returns the number of images: decoder with random crop, resize, normalise."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=max(1, workers), device_id=None)
    def pipeline() -> tuple[Any, Any]:
        data, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(data, random_area=list(CONFIG.crop_scale))
        images = fn.resize(images, size=SIZE, interp_type=types.INTERP_TRIANGULAR, antialias=True)
        scaled = [[255 * value for value in values] for values in (CONFIG.mean, CONFIG.std)]
        return fn.crop_mirror_normalize(images, mean=scaled[0], std=scaled[1]), labels

    running = pipeline()
    running.build()
    steps = epochs * (running.epoch_size("reader") // BATCH)
    for _ in range(steps):
        running.run()
    return steps * BATCH


def _drain(loader: Any, epochs: int) -> int:
    """Passes `epochs` times over a loader of (images, labels) and returns the number of images."""
    return sum(len(images) for _ in range(epochs) for images, _ in loader)


def stages(shards: Path) -> dict[str, float]:
    """Returns the CPU-microseconds per image of each stage of our path, on one thread, over all images once."""
    source = ShardSource(expand(shards))
    draws = np.random.default_rng(0).random((source.num_samples, CROP_DRAWS)).tolist()
    slot = np.empty(source.num_samples * 3 * 1024 * 1024, dtype=np.uint8)
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[int], Any]) -> list[Any]:
        begin = time.process_time()
        results = [work(sample) for sample in range(source.num_samples)]
        found[name] = 1e6 * (time.process_time() - begin) / source.num_samples
        return results

    data = timed("read", source.read)
    options = {"scale": CONFIG.crop_scale, "ratio": CONFIG.crop_ratio}
    crops = timed("decode, crop", lambda sample: decode_crop(data[sample], draws[sample], SIZE, **options))
    ends = np.cumsum([crop.size for crop in crops])

    def copy(sample: int) -> None:
        slot[ends[sample] - crops[sample].size : ends[sample]].reshape(crops[sample].shape)[:] = crops[sample]

    timed("first touch, copy", copy)
    timed("copy", copy)
    order = SampleOrder(source.shard_sizes, BATCH, 0, 4)
    loader = TrainLoader(source, order, CONFIG, SIZE, seed=0, stop_step=order.steps_per_epoch)
    run = Augment(CONFIG, SIZE, seed=0)
    spent = 0.0
    for batch in loader:
        begin = time.process_time()
        run(batch)
        spent += time.process_time() - begin
    found["resize, normalise"] = 1e6 * spent / (len(loader) * BATCH)
    return found


def resume_seconds(samples: int) -> float:
    """Returns the seconds from a cold start to the sample ids of a batch in mid-epoch; shards hold 10,000 samples."""
    begin = time.perf_counter()
    shards = np.full(-(-samples // 10_000), 10_000, dtype=np.int64)
    order = SampleOrder(shards, 2048, 0, 8)
    order.batch(order.steps_per_epoch // 2)
    return time.perf_counter() - begin


def compare(folder: Path, shards: Path, workers: int, rounds: int, epochs: int) -> dict[str, dict[str, list[float]]]:
    """Returns images per CPU-second and per second of each path, one value per round; the paths take turns."""
    paths: dict[str, Callable[[], int]] = {
        CLASSIC: lambda: torchvision_folder(folder, workers, epochs),
        "webdataset + PIL": lambda: plain_webdataset(shards, workers, epochs),
        "ours, to the uint8 batch": lambda: ours(shards, workers, epochs, augment=False),
        "ours, resized on the CPU": lambda: ours(shards, workers, epochs, augment=True),
    }
    try:
        import nvidia.dali  # noqa: F401

        paths["DALI, CPU"] = lambda: dali(folder, workers, epochs)
    except ImportError:
        print("DALI is not installed; skipping it")
    found: dict[str, dict[str, list[float]]] = {name: {"per_cpu_s": [], "per_s": []} for name in paths}
    for turn in range(rounds + 1):
        for name, run in paths.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            count = run()
            cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
            if turn:  # the first turn warms up: imports, the fork server, the page cache
                found[name]["per_cpu_s"].append(count / cpu)
                found[name]["per_s"].append(count / wall)
    return found


def class_folders(images: Path, scratch: Path) -> Path:
    """Returns the folder of class folders; unpacks a tar into `scratch`."""
    if images.is_dir():
        return ImageFolderSource(images).root
    with tarfile.open(images) as tar:
        tar.extractall(scratch, filter="data")
    return ImageFolderSource(scratch).root


def draw(found: dict[str, dict[str, list[float]]], parts: dict[str, float], path: Path) -> None:
    """Draws the rates and the stages into a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    medians = {name: percentiles(values["per_cpu_s"])["p50"] for name, values in found.items()}
    left.barh(list(medians), list(medians.values()), color=["#888" if "ours" not in n else "#1f77b4" for n in medians])
    left.invert_yaxis()
    left.set_xlabel("images per CPU-second")
    right.barh(list(parts), list(parts.values()), color="#1f77b4")
    right.invert_yaxis()
    right.set_xlabel("our stages: CPU-microseconds per image")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the benchmark, prints its tables, and writes the rows and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of class folders")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--epochs", type=int, default=10, help="epochs in each turn, which includes starting the workers"
    )
    parser.add_argument("--to", type=Path, help="JSONL file that the rows are appended to")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = class_folders(options.images, Path(scratch) / "images")
        shards = Path(scratch) / "shards"
        make_shards(FolderImages(folder), shards, plan=MakePlan(shard_bytes=SHARD_BYTES))
        found = compare(folder, shards, options.workers, options.rounds, options.epochs)
        for name, values in found.items():
            per = {key: percentiles(value) for key, value in values.items()}
            append(options.to, {"benchmark": "loader", "path": name, "workers": options.workers, **per})
        parts = stages(shards)
        append(options.to, {"benchmark": "loader stages, us per image", **parts})
    rows = [row for row in _rows(found)]
    print(table(["path", "images per CPU-second, 20-50-80 %", "images per second", "times the classic's"], rows))
    print()
    print(table(["stage", "CPU-microseconds per image"], [[name, f"{value:.0f}"] for name, value in parts.items()]))
    print()
    for samples in (1_281_167, 10**9):
        seconds = percentiles([resume_seconds(samples) for _ in range(5)])
        append(options.to, {"benchmark": "resume", "samples": samples, "seconds": seconds})
        print(f"resume in mid-epoch of {samples:,} samples: {1e3 * seconds['p50']:.1f} ms")
    if options.plot:
        draw(found, parts, options.plot)


def _rows(found: dict[str, dict[str, list[float]]]) -> Iterator[list[str]]:
    """Yields the lines of the table; the last column is the median of the ratios within a turn."""
    for name, values in found.items():
        per = percentiles(values["per_cpu_s"])
        pairs = zip(values["per_cpu_s"], found[CLASSIC]["per_cpu_s"], strict=True)
        ratio = percentiles([ours / classic for ours, classic in pairs])["p50"]
        rate = percentiles(values["per_s"])["p50"]
        yield [name, f"{per['p20']:.0f} - {per['p50']:.0f} - {per['p80']:.0f}", f"{rate:.0f}", f"{ratio:.2f}"]


if __name__ == "__main__":
    main()

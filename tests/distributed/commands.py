"""Starts real runs of launch/pretrain.py on a small set of real shards."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from ijepa_scale import environment
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"
CONFIG = """
folder: {folder}
model: {{name: vit_tiny, image_size: 32, patch_size: 4, width: 48, depth: 2, heads: 3, predictor_width: 24,
  predictor_depth: 1}}
masks: {{min_keep: 3, group_size: 8}}
data: {{train: {data}, batch_size: 8, workers: 1}}
augment: {{flip: 0.5, color_jitter: 0.4, blur: 0.5}}
schedule: {{epochs: 2, warmup_epochs: 1, steps_per_epoch: 10, momentum: [0.9, 1.0]}}
engine: {{device: cpu, precision: fp32}}
logging: {{every: 1, tensorboard: false}}
checkpoint: {{every: 3}}
evaluate: {{every: 10, train: {data}, test: {data}, max_train: 40, max_test: 16, batch_size: 8}}
health: {{every: 4, images: 16}}
"""
ZERO3 = ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero3_small.json")


STARTED: list[subprocess.Popen] = []  # by the test that runs now


def write_data(folder: Path) -> Path:
    """Writes 50 JPEG images of varying sizes in 2 classes into 3 shards."""
    generator = np.random.default_rng(0)
    samples = []
    for index in range(50):
        height, width = generator.integers(30, 70, size=2)
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        samples.append(Sample(key=f"{index:04d}", image=buffer.getvalue(), label=index % 2))
    write_shards(samples, folder, shard_bytes=25_000)
    return folder


def write_photos(shards: Path, folder: Path) -> dict[str, Path]:
    """Writes the images of shards as files of a folder without classes, and a list of them; returns both by reader."""
    source = ShardSource(expand(shards))
    names = [f"{'deep/er/' * (number % 4 == 0)}photo {number}.jpg" for number in range(source.num_samples)]
    (folder / "photos" / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / "photos" / name).write_bytes(source.read(number))
    (folder / "list.txt").write_text("".join(f"photos/{name}\n" for name in names))
    return {"imagefolder": folder / "photos", "list": folder / "list.txt"}


def write_config(path: Path, data: Path, folder: Path) -> Path:
    path.write_text(CONFIG.format(data=data, folder=folder))
    return path


def start(
    config: Path, *arguments: str, launcher: tuple[str, ...] = (), script: Path = PRETRAIN, **variables: str
) -> subprocess.Popen:
    """Starts a launch in its own process group, with its output in a log file next to the config."""
    if launcher and launcher[0].endswith("deepspeed") and not {"--master_port", "--hostfile"} & {*launcher}:
        launcher = (*launcher, "--master_port", str(environment.free_port()))  # its own is the same for all tests
    command = [*(launcher or (sys.executable,)), str(script), "--config", str(config)]
    log = config.with_suffix(".log").open("a")
    run = subprocess.Popen(
        [*command, *arguments],
        cwd=config.parent,
        env=clean_environment(**variables),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    STARTED.append(run)
    return run


def have_ended(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Returns whether all processes end in time. One that nobody has waited for yet has ended too."""
    deadline = time.monotonic() + seconds
    while not all(_has_ended(each) for each in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def clean_environment(**variables: str) -> dict[str, str]:
    """Returns the environment without the variables of launchers."""
    changes = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    inherited = environment.child_environment()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    return {**inherited, **changes}


def finish(process: subprocess.Popen, config: Path, *, code: int = 0, timeout: float = 240) -> str:
    """Waits for the launch, checks its exit code and returns its log."""
    found = process.wait(timeout=timeout)
    log = config.with_suffix(".log").read_text()
    assert found == code, f"exit code {found}, expected {code}:\n{log[-4000:]}"
    return log


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the complete rows of metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Returns (loss, gradient norm) by step."""
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(folder) if "loss" in row}


def final_hashes(folder: Path) -> list[str]:
    """Returns the hashes of the newest checkpoint's files, which hold weights, moments and target."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    return [file["sha256"] for file in manifest["body"]["files"]]
